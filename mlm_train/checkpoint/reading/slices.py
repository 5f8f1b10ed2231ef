"""Read rectangles of logical tensors: only their bytes, straight to where they belong."""

import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.checkpoint.headers import FIX
from mlm_train.checkpoint.index import CheckpointIndex
from mlm_train.checkpoint.shards import bytes_of
from mlm_train.errors import UserError
from mlm_train.model.logical import LogicalSlice
from mlm_train.utils.files import finished, open_regular, read_at
from mlm_train.utils.threads import in_threads

PAGE = 4096  # bytes: a gap that is smaller costs nothing to read
BLOCK = 2**24  # bytes read at once
BATCH = 2**20  # bytes, at least, that a thread reads before it is given more
THREADS = 4  # that read at once


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
                _check_size(index, number, os.fstat(opened.fileno()).st_size)
                ordered = sorted(transfers[number], key=lambda one: one.begin)
                batches = _batches(chain.from_iterable(map(_blocks, ordered)))
                for _ in in_threads(partial(_read, opened.fileno(), path), batches, THREADS):
                    yield
        except FileNotFoundError:
            raise UserError(f"{path} is missing; {FIX}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _check_size(index: CheckpointIndex, number: int, size: int) -> None:
    """Raise UserError for a file of another size than the manifest has."""
    if index.sizes is not None and size != index.sizes[number]:
        path, expected = index.folder / index.files[number], index.sizes[number]
        raise UserError(f"{path} is damaged ({size} bytes instead of {expected}); {FIX}")


class _Block(NamedTuple):
    """Rows of a part of a tensor, to be read at once: [rows, *row] from byte `begin` on."""

    begin: int
    row: Sequence[int]  # shape
    columns: tuple[slice, ...]  # of them, those that are wanted
    target: Tensor
    dtype: torch.dtype  # in the file


def _blocks(one: _Transfer) -> Iterator[_Block]:
    """What to read for a rectangle: rows that follow one another together, others each by itself."""
    begin, shape, inside, target, dtype = one
    row, held = math.prod(shape[1:]) * dtype.itemsize, target[0].numel() * dtype.itemsize
    if row - held >= PAGE:
        for number, inner in enumerate(target):
            at = begin + (inside[0] + number) * row
            yield from _blocks(_Transfer(at, shape[1:], inside[1:], inner, dtype))
        return
    begin += inside[0] * row
    columns = tuple(slice(a, a + n) for a, n in zip(inside[1:], target.shape[1:], strict=True))
    rows = max(1, BLOCK // row)
    for first in range(0, len(target), rows):
        yield _Block(begin + first * row, shape[1:], columns, target[first : first + rows], dtype)


def _batches(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    """What a thread reads at once: blocks of BATCH bytes or more together, since each call has its price."""
    batch, size = list[_Block](), 0
    for block in blocks:
        batch.append(block)
        size += block.target.nbytes
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read(file: int, path: Path, batch: Iterable[_Block]) -> None:
    for block in batch:
        _read_block(file, path, block)


def _read_block(file: int, path: Path, block: _Block) -> None:
    """Read a block: straight to where it belongs, where that has the same bytes."""
    begin, row, columns, target, dtype = block
    straight = (
        target.is_contiguous()
        and target.device.type == "cpu"
        and target.dtype == dtype
        and list(target.shape[1:]) == list(row)
    )
    held = target if straight else torch.empty(len(target), *row, dtype=dtype)
    if (count := read_at(file, bytes_of(held), begin)) < held.nbytes:
        raise UserError(f"{path} is damaged: it ends at byte {begin + count}; {FIX}")
    if not straight:
        target.copy_(held[:, *columns])


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
