"""A build computes FFN-M as the model does, to the bit."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlm_train.checkpoint.logical_folder import open_model
from mlm_train.model.transformer import Transformer
from mlm_train.tol.codec import TORCH_DTYPE, PlainDtype, Scheme, encode
from mlm_train.tol.compute import EMBEDDING, FfnM, Places, ffn_m_weights
from mlm_train.tol.state import Layout, Storage
from mlm_train.tol.worker import Encoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_as_the_model_does(model: Transformer, exported: Path, dtype: PlainDtype) -> None:
    layers = range(model.config.num_hidden_layers)
    with open_model(exported) as opened:
        weights = ffn_m_weights(opened.tensors, opened.config, layers, dtype)
        numbers = FfnM(opened, dict(zip(layers, weights, strict=True)), dtype)
        found = torch.stack(list(numbers.values(5, 207)))
        x0 = opened.tensor(EMBEDDING)[5:207].float()
        room = torch.zeros(202, 3 * 32, dtype=TORCH_DTYPE[dtype])
        places = [room[:, :32], None, room[:, 64:]]
        placed = list(numbers.values(5, 207, places))
        other = [torch.zeros(202, 32, dtype=torch.float64)] * 3
        assert torch.stack(list(numbers.values(5, 207, other))).equal(found) and not other[0].any()
    with torch.autocast("cpu", TORCH_DTYPE[dtype], enabled=dtype != "float32"):
        true = torch.stack([block.ffn_m(x0) for block in model.layers.values()])
    assert found.dtype == true.dtype == TORCH_DTYPE[dtype] and true.abs().max() > 0.1
    assert found.equal(true)
    assert placed[0] is places[0] and placed[2] is places[2] and torch.stack(placed).equal(found)
    assert not room[:, 32:64].any()
    with torch.enable_grad(), torch.autocast("cpu", TORCH_DTYPE[dtype], enabled=dtype != "float32"):
        trained = torch.stack([block.ffn_m(x0.clone().requires_grad_()) for block in model.layers.values()])
    assert trained.requires_grad and trained.equal(true)  # as in training


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_bytes_of_rows_in_used_memory(stored: PlainDtype) -> None:
    """Numbers put in their place, and converted; what fills a layer up to 16 bytes is zero either way."""
    schemes = [Scheme(dtype=stored), Scheme(dtype="int8", group_size=8), Scheme(dtype=stored)]
    place = Layout.of(Storage(layers=[0, 1, 2], schemes=schemes), 3, 10)
    found = torch.full((6, place.shape.size), 255, dtype=torch.uint8)
    rows = torch.randn(3, 6, 10, dtype=torch.float16)

    class Random:
        def values(self, first: int, last: int, places: Places = None) -> Iterator[Tensor]:
            assert (first, last) == (0, 6)
            for values, put in zip(rows, places or [None] * 3, strict=True):
                yield put.copy_(values) if put is not None and put.dtype == values.dtype else values

    Encoder(place, [0, 1, 2], Path("none")).encode(Random(), 0, 6, found)
    wanted = torch.full_like(found, 255)
    for values, scheme, (begin, end) in zip(rows, schemes, itertools.pairwise(place.edges), strict=True):
        encode(scheme, values, wanted[:, begin:end])
    assert found.equal(wanted) and place.shape.size % 16 == 0
