"""Compiled layers: the same values as eager ones, and one graph for all layers and row counts."""

import pytest
import torch
from torch._dynamo.utils import counters

from mlm_train.config.schema import ActivationCheckpointing
from mlm_train.memory import make_source
from mlm_train.memory.table import TableSource
from mlm_train.model.initial import initialise
from mlm_train.model.transformer import Transformer
from tests.parallel.layouts import MODELS
from tests.parallel.reference import relative_error, sharpen, tiny_config


def step(model: Transformer, mode: str | None, ids: torch.Tensor, weights: torch.Tensor) -> dict:
    """Logits and gradients of a random linear objective."""
    model.zero_grad(set_to_none=True)
    source = make_source(mode, model.memory_blocks()) if mode else None
    rows = None
    if isinstance(source, TableSource):
        distinct = ids.unique()
        rows = model.rows(distinct)
        source.begin(source.plan(distinct, distinct, 1), rows)
    logits = model(ids, source)
    (logits * weights).sum().backward()
    if isinstance(source, TableSource) and rows is not None:
        rows.backward(source.finish())
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "mode", "recompute", "graphs"),
    [
        ("base gqa tied", None, "selective", 1),
        ("memory tied alpha", "table", "full", 3),  # FFN-M is compiled without gradients too
        ("flex linear post tied", "unique", "none", 2),
    ],
)
def test_same_values_from_few_graphs(
    name: str, mode: str | None, recompute: ActivationCheckpointing, graphs: int
) -> None:
    """A graph serves all layers, whatever their alpha, and all numbers of distinct ids."""
    torch.compiler.reset()
    counters.clear()
    config = tiny_config(dict(MODELS[name]))
    model = Transformer(config.model)
    initialise(model, config.model, 3)
    sharpen(model)
    for number in range(3):
        ids = torch.randint(0, (96, 31, 7)[number], (2, 24))
        weights = torch.randn(*ids.shape, 96)
        results = {}
        for compiles in (False, True):
            for layer in range(config.model.num_hidden_layers):
                model.block(layer).set_activation_checkpointing(recompute)
                model.block(layer).compiles = compiles
            results[compiles] = step(model, mode, ids, weights)
        assert relative_error(results[True], results[False]) < 2e-5
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_bf16_is_as_close_to_fp32_as_eager(recompute: ActivationCheckpointing) -> None:
    """On a CPU compiled layers use another backward of attention: kernels/cpu_attention.py."""
    torch.compiler.reset()
    counters.clear()
    config = tiny_config(dict(MODELS["memory"]))
    model = Transformer(config.model)
    initialise(model, config.model, 3)
    sharpen(model)
    # Of one batch the largest error of any tensor is up to a quarter above or below that of another.
    batches = [(torch.randint(0, 96, (2, 24)), torch.randn(2, 24, 96)) for _ in range(4)]
    exact = [step(model, "per_token", *batch) for batch in batches]
    errors = {}
    for compiles in (False, True):
        for layer in range(config.model.num_hidden_layers):
            model.block(layer).set_activation_checkpointing(recompute)
            model.block(layer).compiles = compiles
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = [step(model, "per_token", *batch) for batch in batches]
        errors[compiles] = sum(map(relative_error, rounded, exact))
    assert 0 < errors[True] < 1.25 * errors[False]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
