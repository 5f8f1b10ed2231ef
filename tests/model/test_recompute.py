"""Activation checkpointing: the same gradients with fewer activations."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mlm_train.memory import make_source
from mlm_train.model.initial import initialise
from mlm_train.model.transformer import Transformer
from tests.parallel.layouts import MODELS
from tests.parallel.reference import tiny_config


def step(model: Transformer, mode: str | None, ids: torch.Tensor) -> tuple[dict, int]:
    """Gradients, and the bytes of distinct tensors that autograd saved."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad(set_to_none=True)
    source = make_source(mode, model.memory_blocks()) if mode else None
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, source).float().logsumexp(-1).sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, sum(saved.values())


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name, model in MODELS.items()
        for mode in ((None,) if model["kind"] == "base" else ("per_token", "unique"))
    ],
)
def test_same_gradients_with_fewer_activations(name: str, mode: str | None) -> None:
    config = tiny_config(dict(MODELS[name]))
    model = Transformer(config.model)
    initialise(model, config.model, 3)
    ids = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(1))
    results = {}
    for extent in ("none", "selective", "full"):
        for layer in range(config.model.num_hidden_layers):
            model.block(layer).set_activation_checkpointing(extent)
        results[extent] = step(model, mode, ids)
    for extent in ("selective", "full"):
        for parameter, gradient in results["none"][0].items():
            torch.testing.assert_close(results[extent][0][parameter], gradient, rtol=0, atol=0)
    sizes = {extent: size for extent, (_, size) in results.items()}
    assert sizes["full"] < sizes["selective"] < sizes["none"], sizes
