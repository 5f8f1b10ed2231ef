"""The flat tensors of AdamW's fp32 weights and moments, and the positions of parameters in them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from mlm_train.parallel.ffn_m.embedding import RowOrder


class Run(NamedTuple):
    """Elements [start, start + length) of a parameter are at `position` in a rank's flat tensor."""

    start: int
    length: int
    position: int


class Flat(NamedTuple):
    """A flat fp32 tensor of AdamW on this rank. Its moments are in the optimizer's state of `owner`."""

    tensor: Tensor
    owner: Tensor
    members: dict[str, Run]  # by parameter name
    order: RowOrder | None = None  # of its rows, where checkpoints have another one
    replicas: Any = None  # group of the ranks that hold this very tensor; None: this rank alone


def cut_anywhere(offset: int, numel: int, size: int, rank: int) -> Run:
    """A rank's run of a parameter at `offset` of concatenated ones that are cut into shards of `size`."""
    low, high = max(rank * size, offset), min((rank + 1) * size, offset + numel)
    return Run(low - offset, max(high - low, 0), low - rank * size)


def cut_evenly(position: int, numel: int, size: int, rank: int) -> Run:
    """A rank's run of a parameter that is itself cut into shards of `size`, the last one padded."""
    start = min(rank * size, numel)
    return Run(start, min(size, numel - start), position)


class Share(NamedTuple):
    """A flat tensor, and by which of its elements each rank that holds it is served.

    `cuts`: rank r of `flat.replicas` writes and reads elements [cuts[r], cuts[r + 1]).
    """

    flat: Flat
    cuts: Sequence[int]

    @property
    def mine(self) -> tuple[int, int]:
        """[start, stop) of this rank's elements."""
        rank = 0 if self.flat.replicas is None else dist.get_rank(self.flat.replicas)
        return self.cuts[rank], self.cuts[rank + 1]


def shares(flats: Iterable[Flat]) -> Iterator[Share]:
    """Divide the flat tensors evenly among the ranks that hold the same ones, laid end to end."""
    flats = list(flats)
    sizes = [0 if flat.replicas is None else flat.tensor.numel() for flat in flats]
    total = sum(sizes)
    for flat, size, end in zip(flats, sizes, accumulate(sizes), strict=True):
        if flat.replicas is None:
            yield Share(flat, (0, flat.tensor.numel()))
            continue
        ranks = dist.get_world_size(flat.replicas)
        bounds = (total * rank // ranks - (end - size) for rank in range(ranks + 1))
        yield Share(flat, [min(max(bound, 0), size) for bound in bounds])


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Yield the rectangles, in order, of a tensor's elements [start, stop): part of a row, rows, part of one.

    shape: of the tensor, one dimension or more. Each rectangle's elements follow one another.
    """
    if len(shape) == 1:
        if start < stop:
            yield (slice(start, stop),)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # [first, last): the rows that are whole
    if first > last:  # it begins and ends within one row
        for inner in rectangles(shape[1:], start - last * row, stop - last * row):
            yield (slice(last, first), *inner)
        return
    for inner in rectangles(shape[1:], start - (first - 1) * row, row):
        yield (slice(first - 1, first), *inner)
    if first < last:
        yield (slice(first, last), *(slice(0, size) for size in shape[1:]))
    for inner in rectangles(shape[1:], 0, stop - last * row):
        yield (slice(last, last + 1), *inner)
