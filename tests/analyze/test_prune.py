"""Pruning of base models: what the methods' papers imply, and each against an independent computation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlm_train.analyze.prune.matrix import (
    COLUMNS,
    METHODS,
    InputMoments,
    magnitude,
    output_error,
    sparsegpt,
    wanda,
)
from mlm_train.analyze.prune.model import prune, sparsity_like
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.config import ModelConfig
from mlm_train.model.counts import count_parameters
from tests.commands import mlm_train, refused
from tests.tol.conftest import export, random_model


def moments_of(x: Tensor) -> InputMoments:
    """In two unequal pieces, which must count by their positions."""
    moments = InputMoments(x.shape[1], x.device)
    moments.add(x[:7])
    moments.add(x[7:].view(1, -1, x.shape[1]))
    return moments


def correlated(positions: int, width: int) -> Tensor:
    """Inputs of unequal sizes, mixed with one another."""
    draws = torch.Generator().manual_seed(1)
    mix = torch.randn(width, width // 2, generator=draws)
    x = torch.randn(positions, width // 2, generator=draws) @ mix.T
    x += 0.3 * torch.randn(positions, width, generator=draws)
    return x * torch.logspace(-1, 1, width)[torch.randperm(width, generator=draws)]


def weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def test_exactly_so_many_zeros() -> None:
    w, moments = weight(24, 300), moments_of(correlated(500, 300))
    assert (magnitude(w, moments, 0.6) == 0).sum() == round(0.6 * w.numel())
    assert ((wanda(w, moments, 0.6) == 0).sum(1) == 180).all()
    pruned = sparsegpt(w, moments, 0.6)
    for start in range(0, 300, COLUMNS):
        block = pruned[:, start : start + COLUMNS]
        assert (block == 0).sum() == round(0.6 * block.numel())


def test_the_more_a_method_knows_the_smaller_the_error() -> None:
    w, x = weight(32, 256), correlated(2000, 256)
    moments = moments_of(x)
    errors = {}
    for name, method in METHODS.items():
        pruned = method(w, moments, 0.5)
        errors[name] = output_error(w, pruned, moments)
        direct = ((w - pruned) @ x.T).square().sum() / (w @ x.T).square().sum()
        assert errors[name] == pytest.approx(float(direct), rel=1e-3)
    assert errors["sparsegpt"] < 0.8 * errors["wanda"] < 0.5 * errors["magnitude"]


def test_inputs_of_one_size_make_wanda_magnitude_by_row() -> None:
    w, moments = weight(16, 64), InputMoments(64, torch.device("cpu"))
    moments.mean = torch.eye(64)
    rows = [magnitude(row[None], moments, 0.7) for row in w]
    assert torch.equal(wanda(w, moments, 0.7), torch.cat(rows))


def test_independent_inputs_leave_sparsegpt_nothing_to_make_up() -> None:
    w, moments = weight(16, 200), InputMoments(200, torch.device("cpu"))
    moments.mean = torch.rand(200, generator=torch.Generator().manual_seed(3)).add(0.1).diag()
    pruned = sparsegpt(w, moments, 0.5)
    torch.testing.assert_close(pruned, torch.where(pruned == 0, 0.0, w), rtol=1e-12, atol=0)


def test_sparsegpt_is_the_optimal_update_of_each_column_in_turn() -> None:
    """Against explicit inverses of the Hessian of the columns that are left, without any factor or block."""
    w, x = weight(6, 20), correlated(200, 20)
    moments = moments_of(x)
    pruned = sparsegpt(w, moments, 0.5)
    hessian = 2 * moments.mean.double().numpy()
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(20)
    expected = w.double().numpy().copy()
    scores = [expected[:, j] ** 2 / np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(20)]
    zeros = np.stack(scores, 1)
    zeros = zeros <= np.sort(zeros.ravel())[59]
    for column in range(20):
        inverse = np.linalg.inv(hessian[column:, column:])
        lost = expected[:, column] * zeros[:, column]
        expected[:, column:] -= np.outer(lost / inverse[0, 0], inverse[0])
    expected[zeros] = 0
    np.testing.assert_allclose(pruned, expected, rtol=1e-4, atol=1e-5)


def test_an_input_that_is_always_zero() -> None:
    x = correlated(400, 40)
    x[:, 5] = 0
    pruned = sparsegpt(weight(8, 40), moments_of(x), 0.5)
    assert pruned.isfinite().all() and (pruned[:, 5] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_layers_in_turn_against_transformers(method: str, tmp_path: Path) -> None:
    """Inputs seen by hooks in transformers' Llama, whose layers before are pruned already."""
    from transformers import LlamaForCausalLM

    model = random_model(kind="base")
    other = LlamaForCausalLM.from_pretrained(export(tmp_path / "model", model)).eval()
    ids = torch.randint(0, 601, (6, 16), generator=torch.Generator().manual_seed(4))
    found = prune(model, [ids[:4], ids[4:]], method, 0.5)
    names = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    by_name = {(matrix.layer, matrix.name): matrix for matrix in found}
    assert len(by_name) == 3 * 7
    for number, layer in enumerate(other.model.layers):
        linears = {f"self_attn.{name}": getattr(layer.self_attn, name) for name in names[0]}
        linears |= {f"mlp.{name}": getattr(layer.mlp, name) for name in names[1]}
        inputs: dict[str, Tensor] = {}
        hooks = [
            linear.register_forward_pre_hook(
                lambda _, x, name=name, inputs=inputs: inputs.update({name: x[0].flatten(0, 1)})
            )
            for name, linear in linears.items()
        ]
        with torch.inference_mode():
            other(ids)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            pruned = METHODS[method](linear.weight, moments_of(inputs[name]), 0.5)
            own = dict(model.block(number).named_modules())
            parent, _, last = name.rpartition(".")
            fused = {"self_attn": "qkv_proj", "mlp": "gate_up_proj"}[parent]
            mine = own[name].weight if name in own else own[f"{parent}.{fused}"].weight
            if name not in own:
                parts = own[f"{parent}.{fused}"].parts
                mine = dict(zip(parts, mine.split(list(parts.values())), strict=True))[last]
            torch.testing.assert_close(mine, pruned, rtol=1e-3, atol=1e-5)
            assert by_name[number, name].zeros == int((pruned == 0).sum())
            linear.weight.data.copy_(pruned)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), other(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_what_stays_is_what_is_active(beta: int) -> None:
    """Of the paper's own shapes; FFN-C takes beta / 8 of FFN-M."""
    fields = {"vocab_size": 8, "hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32}
    base = ModelConfig(kind="base", intermediate_size=5464, **fields)
    flex = (
        ModelConfig(kind="flex", flex_beta=beta, intermediate_size=5464 - beta * 683, **fields)
        if beta
        else (ModelConfig(kind="memory", intermediate_size=5464, **fields))
    )
    kept = (1 - sparsity_like(base, beta)) * count_parameters(base).total
    assert kept == pytest.approx(count_parameters(flex).active, rel=2e-3)


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(tmp_path / "model", random_model(kind="base", vocab_size=512))
    command = ("analyze", "prune", "--model", folder, "--data", data, "--calibration", 12, "--samples", 6)
    command = (*command, "--sequence-length", 32)
    capsys.readouterr()
    mlm_train(*command, "--method", "wanda", "--like", "flex1", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["zeros"] == pytest.approx(found["sparsity"], abs=0.02)
    assert found["sparsity"] == pytest.approx(1 - (3 * 32 * 32 + 32 * 32) / (3 * 32 * 32 + 3 * 32 * 44))
    output = tmp_path / "pruned"
    mlm_train(*command, "--method", "sparsegpt", "--sparsity", "0.5", "--output", output)
    text = capsys.readouterr().out
    assert "sparsegpt: 50.00% of the layers' matrices are zero" in text
    pruned = load_model(output)
    assert (pruned.block(2).mlp.down_proj.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    score = ("--samples", 6, "--sequence-length", 32, "--json")
    mlm_train("evaluate", "--model", output, "--data", data, *score)
    scored = json.loads(capsys.readouterr().out)
    assert f"pruned {scored['perplexity']:,.4f}" in text
    assert "nothing is overwritten" in refused(
        *command, "--method", "wanda", "--like", "memory", "--output", output
    )
    memory = export(tmp_path / "memory", random_model(vocab_size=512))
    line = refused(
        "analyze", "prune", "--model", memory, *command[4:], "--method", "wanda", "--like", "flex1"
    )
    assert "is a memory model: give a base model to prune" in line
