"""Read rectangles of logical tensors: only their bytes, straight to where they belong."""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.checkpoint.index import FIX, CheckpointIndex
from mlm_train.checkpoint.shards import BLOCK, bytes_of
from mlm_train.errors import UserError
from mlm_train.model.logical import LogicalSlice
from mlm_train.utils.files import finished, open_regular, read_at

PAGE = 4096  # bytes: a gap that is smaller costs nothing to read


class _Transfer(NamedTuple):
    """Elements to copy from a part of a tensor in a file: a rectangle from `inside` on, of target's shape."""

    begin: int  # byte of the part in the file
    part_shape: Sequence[int]
    inside: Sequence[int]
    target: Tensor
    dtype: torch.dtype  # in the file


def read_slices(index: CheckpointIndex, slices: Iterable[LogicalSlice]) -> Generator[None, None, None]:
    """Fill the tensors of slices; yields after each block, for its caller to report progress.

    Each file that is needed is opened once. Raises UserError for a tensor that is missing, incomplete or of
    another shape, and for a file that ends too early.
    """
    transfers: dict[int, list[_Transfer]] = {}
    for name, shape, offset, tensor in slices:
        stored = index.stored(name)
        if stored.shape != tuple(shape):
            raise UserError(
                f"checkpoint {index.folder}: {name} has shape {list(stored.shape)}, not {list(shape)}; {FIX}"
            )
        for file, begin, part_shape, inside, wanted in index.regions(name, offset, tensor.shape):
            one = _Transfer(begin, part_shape, inside, tensor[wanted], stored.dtype)
            transfers.setdefault(file, []).append(one)
    for number in sorted(transfers):
        path = index.folder / index.files[number]
        try:
            with open_regular(path) as opened:
                for one in sorted(transfers[number], key=lambda one: one.begin):
                    yield from _transfer(opened.fileno(), path, one)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _transfer(file: int, path: Path, one: _Transfer) -> Iterator[None]:
    """Read a rectangle in blocks: at once where its rows follow one another, else row by row."""
    begin, shape, inside, target, dtype = one
    row, held = math.prod(shape[1:]) * dtype.itemsize, target[0].numel() * dtype.itemsize
    if row - held >= PAGE:
        for number, inner in enumerate(target):
            at = begin + (inside[0] + number) * row
            yield from _transfer(file, path, _Transfer(at, shape[1:], inside[1:], inner, dtype))
        return
    begin += inside[0] * row
    columns = tuple(slice(a, a + n) for a, n in zip(inside[1:], target.shape[1:], strict=True))
    straight = (
        target.is_contiguous() and target.device.type == "cpu" and target.dtype == dtype and row == held
    )
    rows = max(1, BLOCK // row)
    for first in range(0, len(target), rows):
        part = target[first : first + rows]
        block = part if straight else torch.empty(len(part), *shape[1:], dtype=dtype)
        at = begin + first * row
        if (count := read_at(file, bytes_of(block), at)) < block.nbytes:
            raise UserError(f"{path} is damaged: it ends at byte {at + count}; {FIX}")
        if not straight:
            part.copy_(block[:, *columns])
        yield


def read_tensor(index: CheckpointIndex, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows [start, stop) of a tensor, by default all. Raises as read_slices does."""
    stored = index.stored(name)
    start, stop, _ = slice(start, stop).indices(stored.shape[0])
    shape = (max(stop - start, 0), *stored.shape[1:])
    rows = torch.empty(shape, dtype=stored.dtype)
    if len(rows):
        offset = (start, *(0 for _ in shape[1:]))
        finished(read_slices(index, [LogicalSlice(name, torch.Size(stored.shape), offset, rows)]))
    return rows
