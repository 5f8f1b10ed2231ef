"""Forwards through the cache equal the full forward, in chunks, with padding, and with rows dropped."""

from typing import Any

import pytest
import torch

from mlm_train.inference.cache import KVCache
from tests.inference.test_decode import KINDS, random_model, source_of


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("chunks", [[30], [7, 11, 1, 1, 10], [1] * 30])
def test_cache_equals_full_forward(fields: dict[str, Any], chunks: list[int]) -> None:
    model = random_model(**fields)
    ids = torch.randint(0, 97, (2, 30))
    full = model(ids, source_of(model))
    cache = KVCache(model.config, 30, padding=[0, 0])
    parts = []
    for chunk in ids.split(chunks, dim=1):
        parts.append(model(chunk, source_of(model), cache))
    assert cache.length == 30
    assert (torch.cat(parts, 1) - full).abs().max() <= 2e-6 * full.abs().max()
    with pytest.raises(ValueError, match="holds 30"):
        model(ids[:, :1], source_of(model), cache)


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("chunks", [[20], [4, 9, 7], [1] * 20])
def test_padded_rows_equal_themselves_alone(fields: dict[str, Any], chunks: list[int]) -> None:
    model = random_model(**fields)
    ids, padding = torch.randint(0, 97, (3, 26)), [0, 6, 15]
    cache = KVCache(model.config, 26, padding)
    # Memory that no forward writes holds anything, in the worst case NaN.
    cache._keys[..., 15:, :] = cache._values[..., 15:, :] = torch.nan
    parts = []
    for stop, chunk in zip(torch.tensor(chunks).cumsum(0), ids[:, :20].split(chunks, dim=1), strict=True):
        rows = sum(pad < stop for pad in padding)
        parts.append(model(chunk[:rows], source_of(model), cache)[:, -1])
    alone = [model(ids[row : row + 1, pad:], source_of(model))[0] for row, pad in enumerate(padding)]
    for row, pad in enumerate(padding):
        assert (parts[-1][row] - alone[row][19 - pad]).abs().max() <= 1e-5
    cache.keep([1, 2])  # columns that are padding in both go
    assert cache.length == 14
    step = model(ids[1:, 20:23], source_of(model), cache)
    for row, pad in ((1, 6), (2, 15)):
        assert (step[row - 1] - alone[row][20 - pad : 23 - pad]).abs().max() <= 1e-5
    cache.keep([1])
    assert cache.length == 8 and cache._padding is None and cache.geometry(1, 1).mask is None
    step = model(ids[2:, 23:], source_of(model), cache)
    assert (step[0] - alone[2][23 - 15 :]).abs().max() <= 1e-5
