"""Tables of a step's rows against FFN-M at every position, in float64."""

import contextlib

import pytest
import torch

from mlm_train.memory import PerTokenSource
from mlm_train.memory.rows import Lookup
from mlm_train.memory.table import TableSource
from mlm_train.model.initial import initialise
from mlm_train.model.source import Positions
from mlm_train.model.transformer import Transformer
from tests.parallel.layouts import MODELS
from tests.parallel.reference import global_batch, relative_error, sharpen, tiny_config


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model["kind"] != "base"])
@pytest.mark.parametrize(("rows", "kept"), [(7, 0), (2048, 0), (7, 1), (2048, 99)])
def test_gradients_equal_per_token(name: str, rows: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlm_train.memory.step_rows.BLOCK_ROWS", rows)
    config = tiny_config(dict(MODELS[name]))
    model = Transformer(config.model).double()
    initialise(model, config.model, 1)
    sharpen(model)
    batches = [global_batch(step, 4)[0] for step in range(3)]
    weights = torch.randn(4, batches[0].shape[1], 96, dtype=torch.float64)

    for ids in batches:
        (model(ids, PerTokenSource(model.memory_blocks())) * weights).sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    source = TableSource(model.memory_blocks(), Positions(), contextlib.nullcontext(), kept_layers=kept)  # type: ignore[arg-type]
    distinct, index = torch.cat(batches).unique(return_inverse=True)
    embedded = model.rows(distinct)
    source.begin(source.plan(distinct, distinct, 3), embedded)
    assert len(source.rows.kept) == min(kept, len(source.blocks))
    gradient, anchor = torch.zeros_like(embedded), torch.zeros(1, requires_grad=True)
    for ids, rows_of_ids in zip(batches, index.split(4), strict=True):
        x0 = Lookup.apply(rows_of_ids, embedded.detach(), gradient, anchor)
        hidden = model.run_layers(x0, source.open(ids, x0), ids)
        assert model.norm is not None
        (model.head(model.norm(hidden)) * weights).sum().backward()
    embedded.backward(gradient + source.finish())
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert relative_error(gradients, expected) < 1e-12
