"""Recorded activations are those of the model, and its parts add up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_train import load
from mlm_train.analyze.hooks import hooks, shares
from mlm_train.checkpoint.reading.logical_folder import open_model
from mlm_train.data.prepared import PreparedData
from mlm_train.memory import make_source
from mlm_train.parallel import runtime
from tests.commands import TINY, mlm_train
from tests.inference.test_decode import KINDS, random_model, source_of


@pytest.mark.parametrize("fields", KINDS)
def test_parts_add_up(fields: dict[str, Any]) -> None:
    model = random_model(**fields).double()
    if model.config.has_memory:
        model = model.scaled([1.0, 0.0, 0.4])
    ids = torch.randint(97, (2, 9))
    expected = model(ids, source_of(model))
    with hooks(model) as cache:
        assert torch.equal(model(ids, source_of(model)), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    x = cache["hook_embed"]
    assert torch.equal(x, model.embed(ids))
    for number in range(3):
        at, block = f"blocks.{number}", model.block(number)
        assert torch.equal(cache[f"{at}.hook_resid_pre"], x)
        parts = [cache.get(f"{at}.hook_{name}_out", torch.zeros(())) for name in ("attn", "mlp", "memory")]
        after = cache[f"{at}.hook_resid_post"]
        assert (x + sum(parts) - after).abs().max() <= 1e-12
        x = after
        assert (f"{at}.hook_mlp_out" in cache) == (model.config.kind != "memory")
        if model.config.has_memory:
            c = cache[f"{at}.memory.hook_post"]
            assert c.shape == (2, 9, 44)
            memory = c @ block.memory_mlp.down_proj.weight.T  # type: ignore[union-attr]
            assert (block.alpha * memory - parts[2]).abs().max() <= 1e-12  # type: ignore[operator]
    final = cache["ln_final.hook_normalized"]
    assert torch.equal(final, model.norm(x)) and torch.equal(model.head(final), expected)
    with hooks(model, lambda name: name == "blocks.1.hook_attn_out") as cache:
        model(ids, source_of(model))
    assert list(cache) == ["blocks.1.hook_attn_out"]


def test_generation_with_hooks(model: Path) -> None:
    loaded = load(model, skip_tokenizer=True)
    expected = loaded.generate([5, 6], max_new_tokens=3)[0].ids
    with hooks(loaded.decoder.model) as cache:
        assert loaded.generate([5, 6], max_new_tokens=3)[0].ids == expected
    assert cache["blocks.1.hook_memory_out"].shape == (1, 1, 32)


def test_shares_are_means_of_their_definitions() -> None:
    model = random_model(kind="flex", flex_beta=2)
    source = make_source("unique", model.memory_blocks())
    batches = [(torch.randint(97, (2, 8)), torch.empty(0)), (torch.randint(97, (1, 8)), torch.empty(0))]
    found = shares(model, source, batches)
    exact, rows = random_model(kind="flex", flex_beta=2).double(), []
    for ids, _ in batches:
        with hooks(exact) as cache:
            exact(ids, make_source("per_token", exact.memory_blocks()))
        at = "blocks.1.hook_"
        before, after = cache[f"{at}resid_pre"], cache[f"{at}resid_post"]
        update, memory = after - before, cache[f"{at}memory_out"]
        values = (
            update.norm(dim=-1),
            after.norm(dim=-1) / before.norm(dim=-1),
            memory.norm(dim=-1),
            memory.norm(dim=-1) / update.norm(dim=-1),
            (memory * update).sum(-1) / update.norm(dim=-1) ** 2,
        )
        rows.append(torch.stack(values).flatten(1))
    expected = torch.cat(rows, 1).mean(1).tolist()
    layer, memory = found[1], found[1]["ffn_m"]
    ours = [layer["update"], layer["growth"], memory["norm"], memory["ratio"], memory["share"]]
    assert ours == pytest.approx(expected, rel=1e-5)
    for layer in found:
        assert sum(layer[name]["share"] for name in ("attention", "ffn", "ffn_m")) == pytest.approx(1)


def test_shares_of_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = (f"data.path={data}", f"train.output={run}", "train.steps=1", "schedule.warmup_steps=0")
    mlm_train("pretrain", "configs/micro.yaml", *TINY, *words)
    runtime.stop()
    capsys.readouterr()
    mlm_train("analyze", "shares", "--model", run, "--data", data, "--samples", 3, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["windows"] == 3 and found["length"] == 64
    assert found["data"] == PreparedData.open(data).fingerprint
    with open_model(str(run)) as opened:
        assert found["model"] == opened.fingerprint
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        assert set(layer) == {"layer", "update", "growth", "attention", "ffn_m"}
        assert layer["attention"]["share"] + layer["ffn_m"]["share"] == pytest.approx(1, rel=1e-5)
