"""Prefetched batches equal those read on demand."""

import threading

import pytest
import torch

from mlm_train.train.batches import MicroBatch, Prefetcher, pinned


def made(key: tuple[int, int]) -> list[MicroBatch]:
    if key[0] < 0:
        raise ValueError("no such samples")
    ids = torch.arange(key[0], key[0] + key[1])
    return [MicroBatch(ids, ids + 1)]


def test_order_is_the_callers_whatever_was_made_ahead() -> None:
    calls: list[tuple[tuple[int, int], int]] = []

    def make(key: tuple[int, int]) -> list[MicroBatch]:
        calls.append((key, threading.get_ident()))
        return made(key)

    data = Prefetcher(make)
    plan: list[tuple[tuple[int, int], tuple[int, int] | None]] = [
        ((0, 4), (4, 4)),
        ((4, 4), (8, 4)),
        ((8, 6), (14, 6)),  # another key than announced: read again
        ((14, 6), None),
        ((20, 6), None),
    ]
    for key, then in plan:
        for found, expected in zip(data.take(key, then), made(key), strict=True):
            assert torch.equal(found.ids, expected.ids) and torch.equal(found.labels, expected.labels)
    assert [key for key, _ in calls] == [(0, 4), (4, 4), (8, 4), (8, 6), (14, 6), (20, 6)]
    assert threading.get_ident() not in {thread for _, thread in calls}


def test_only_a_gpu_s_batches_are_pinned() -> None:
    batches = made((0, 4))
    assert pinned(batches, torch.device("cpu")) is batches


def test_an_error_comes_where_the_batch_is_needed() -> None:
    data = Prefetcher(made)
    data.take((0, 2), (-1, 2))
    with pytest.raises(ValueError, match="no such samples"):
        data.take((-1, 2), None)
