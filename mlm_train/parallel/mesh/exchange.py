"""Rows and their ids between the ranks of a group."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROWS = 256


def gather_ids(ids: Tensor, group: Any) -> list[Tensor]:
    """The ids of every rank of a group on the CPU, int64, by rank. ids int64 [any number]."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return [ids.cpu()]
    count = torch.tensor([len(ids)])
    counts = torch.empty(ranks, dtype=torch.int64)
    dist.all_gather_into_tensor(counts, count, group=group)
    longest = int(counts.max())
    padded = torch.zeros(longest, dtype=torch.int32)
    padded[: len(ids)] = ids
    gathered = torch.empty(ranks * longest, dtype=torch.int32)
    dist.all_gather_into_tensor(gathered, padded, group=group)
    rows = gathered.view(ranks, longest).long()
    return [row[:count] for row, count in zip(rows, counts.tolist(), strict=True)]


def exchange(
    rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Any, wait: bool = True
) -> tuple[Tensor, Any]:
    """All-to-all of rows [sum(sent), ...] -> [sum(received), ...], and the work to wait for without `wait`.

    sent, received: rows for and from each rank.
    """
    count = sum(received)
    # In steps of ROWS, so that an allocator finds buffers of the same size again: counts differ by step.
    output = rows.new_empty(-(-count // ROWS) * ROWS, *rows.shape[1:])[:count]
    work = dist.all_to_all_single(output, rows, list(received), list(sent), group=group, async_op=not wait)
    return output, work


def largest(number: int, group: Any, device: torch.device) -> int:
    """The largest of every rank's number, on every rank. device: where NCCL takes it.

    gloo's own all-reduce passes it from rank to rank, 2 (n - 1) times; this takes log2(n) exchanges.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if dist.get_backend(group) != "gloo":
        value = torch.tensor([number], device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
        return int(value)
    value, other = torch.tensor([number]), torch.empty(1, dtype=torch.int64)
    distance = 1
    while distance < ranks:  # after each exchange it is the largest of twice as many ranks before this one
        sent = dist.isend(value.clone(), group=group, group_dst=(rank + distance) % ranks)
        dist.recv(other, group=group, group_src=(rank - distance) % ranks)
        assert sent is not None
        sent.wait()
        value = torch.maximum(value, other)
        distance *= 2
    return int(value)


def counts_of(ranks_of_rows: Tensor, ranks: int) -> list[int]:
    """Rows of each rank. ranks_of_rows int64 [rows]."""
    counts: list[int] = ranks_of_rows.bincount(minlength=ranks).tolist()
    return counts


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation, int64 [n]."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places
