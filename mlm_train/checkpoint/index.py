"""Where a checkpoint's logical tensors are: which rectangle of which tensor at which byte of which file."""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mlm_train.checkpoint.manifest import MANIFEST
from mlm_train.checkpoint.shards import DTYPES, OFFSETS
from mlm_train.errors import UserError
from mlm_train.utils.files import listed, open_regular, read_at
from mlm_train.utils.records import Count, FileRecord, Record, parse_json, record_of

FIX = "use an older one"
THREADS = 16  # that read headers: each waits for the disk most of the time
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_DTYPES = {word: dtype for dtype, word in DTYPES.items()}


class _Entry(Record):
    """A tensor in a safetensors header."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


class _Place(Record):
    """A rectangle's place in its logical tensor. Files of version 2 have the offset alone."""

    saved_offsets: list[Count]
    tensor: str | None = None
    shape: list[Count] | None = None


class _Part(NamedTuple):
    """A rectangle of a logical tensor in a file."""

    name: str
    whole: tuple[int, ...] | None  # shape of the logical tensor, where the file has it
    start: tuple[int, ...]
    stop: tuple[int, ...]
    dtype: str
    begin: int  # byte in the file


class Region(NamedTuple):
    """What a file's part of a logical tensor has of a wanted rectangle; all in elements."""

    file: int  # number in CheckpointIndex.files
    begin: int  # byte of the part's first element in the file
    part_shape: tuple[int, ...]
    inside: tuple[int, ...]  # first element in the part
    wanted: tuple[slice, ...]  # indices in the wanted rectangle


@dataclass(frozen=True)
class Stored:
    """A logical tensor: its shape, and its parts [parts, dims] from `start` to `stop`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: np.ndarray
    stop: np.ndarray
    file: np.ndarray  # [parts]: number in CheckpointIndex.files
    begin: np.ndarray  # [parts]: byte in that file


@dataclass(frozen=True)
class CheckpointIndex:
    """All logical tensors of a checkpoint by name, such as `exp_avg/model.norm.weight`."""

    folder: Path
    files: Sequence[str]
    tensors: Mapping[str, Stored]

    def stored(self, name: str) -> Stored:
        """A tensor. Raises UserError where the checkpoint has none of that name."""
        if name not in self.tensors:
            raise UserError(f"checkpoint {self.folder}: {name} is missing; {FIX}")
        return self.tensors[name]

    def regions(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> list[Region]:
        """The parts that hold a rectangle of a tensor, each element once. UserError where some has none."""
        stored = self.stored(name)
        first = np.asarray(offset, np.int64)
        low = np.maximum(stored.start, first)
        high = np.minimum(stored.stop, first + np.asarray(shape, np.int64))
        found = (low < high).all(1).nonzero()[0]
        found = found[np.argsort(low[found, 0], kind="stable")]
        rectangles = [(tuple(low[i].tolist()), tuple(high[i].tolist())) for i in found]
        sizes = [math.prod(b - a for a, b in zip(*rectangle, strict=True)) for rectangle in rectangles]
        if sum(sizes) != math.prod(shape) or _overlap(rectangles):
            raise UserError(f"checkpoint {self.folder}: {name} is incomplete; {FIX}")
        return [
            Region(
                int(stored.file[i]),
                int(stored.begin[i]),
                tuple((stored.stop[i] - stored.start[i]).tolist()),
                tuple((low[i] - stored.start[i]).tolist()),
                tuple(map(slice, (low[i] - first).tolist(), (high[i] - first).tolist())),
            )
            for i in found
        ]

    def check_whole(self, name: str) -> None:
        """Raise UserError where a part of a tensor is missing."""
        shape = self.stored(name).shape
        self.regions(name, [0] * len(shape), shape)


def _overlap(rectangles: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether any two rectangles (start, stop) share an element. They are ordered by their first row."""
    open_ones: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for start, stop in rectangles:
        open_ones = [other for other in open_ones if other[1][0] > start[0]]
        for other_start, other_stop in open_ones:
            if all(a < d and c < b for a, b, c, d in zip(start, stop, other_start, other_stop, strict=True)):
                return True
        open_ones.append((start, stop))
    return False


def read_index(folder: Path, files: Sequence[FileRecord]) -> CheckpointIndex:
    """Read the headers of a checkpoint's files, which its manifest lists.

    Raises UserError for a file that is not whole, and for parts that cannot be of one tensor.
    """
    paths = [listed(folder, entry.file, MANIFEST) for entry in files]
    with ThreadPoolExecutor(min(THREADS, len(paths))) as pool:
        headers = list(pool.map(_parts_of, paths))
    by_name: dict[str, list[tuple[int, _Part]]] = {}
    for number, parts in enumerate(headers):
        for part in parts:
            by_name.setdefault(part.name, []).append((number, part))
    tensors = {name: _stored(folder, name, parts) for name, parts in by_name.items()}
    return CheckpointIndex(folder, [path.name for path in paths], tensors)


def _stored(folder: Path, name: str, parts: Sequence[tuple[int, _Part]]) -> Stored:
    """A tensor from its parts and the numbers of their files."""
    wholes = {part.whole for _, part in parts}
    if wholes == {None} and len({len(part.start) for _, part in parts}) == 1:
        wholes = {tuple(max(ends) for ends in zip(*(part.stop for _, part in parts), strict=True))}
    (whole, *others), dtypes = wholes, {part.dtype for _, part in parts}
    if whole is None or others or len(dtypes) > 1 or not all(_fits(part, whole) for _, part in parts):
        raise UserError(f"checkpoint {folder}: the parts of {name} do not fit together; {FIX}")
    return Stored(
        whole,
        _DTYPES[dtypes.pop()],
        np.array([part.start for _, part in parts], np.int64).reshape(len(parts), len(whole)),
        np.array([part.stop for _, part in parts], np.int64).reshape(len(parts), len(whole)),
        np.array([number for number, _ in parts], np.int64),
        np.array([part.begin for _, part in parts], np.int64),
    )


def _fits(part: _Part, whole: tuple[int, ...]) -> bool:
    return len(part.stop) == len(whole) and all(
        end <= size for end, size in zip(part.stop, whole, strict=True)
    )


def _parts_of(path: Path) -> list[_Part]:
    """The parts in a file, from its header. UserError where it is damaged."""
    try:
        with open_regular(path) as file:
            size, descriptor = os.fstat(file.fileno()).st_size, file.fileno()
            length = int.from_bytes(_read(descriptor, 8, 0), "little")
            text = _read(descriptor, length, 8) if length <= min(size - 8, _LARGEST_HEADER) else None
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {FIX}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if text is None:
        raise _damaged(path, "its header is longer than the file")
    header = parse_json(text, path, FIX)
    metadata = header.pop("__metadata__", {})
    places = metadata.get(OFFSETS, "{}") if isinstance(metadata, dict) else None
    if not isinstance(places, str):
        raise _damaged(path, "its metadata is no text")
    tree = parse_json(places.encode(), path, FIX)
    parts = [_part(path, key, value, tree.get(key), 8 + length) for key, value in header.items()]
    end = max((part.begin + _bytes(part) for part in parts), default=8 + length)
    if end != size:
        raise _damaged(path, f"{size} bytes instead of {end}")
    return parts


def _read(descriptor: int, length: int, begin: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: read_at(descriptor, memoryview(buffer), begin)])


def _part(path: Path, key: str, value: object, placed: object, data: int) -> _Part:
    """A part from its entries in the header and the metadata. data: byte at which the tensors begin."""
    if not isinstance(value, dict) or not isinstance(placed, dict | None):
        raise _damaged(path, f"{key} is not described")
    entry = record_of(_Entry, value, path, FIX)
    place = _Place(saved_offsets=[0] * len(entry.shape))
    if placed is not None:
        place = record_of(_Place, placed, path, FIX)
    start = tuple(place.saved_offsets)
    if len(start) != len(entry.shape) or entry.dtype not in _DTYPES or 0 in (entry.shape or [0]):
        raise _damaged(path, f"{key} has no such place or dtype")
    stop = tuple(first + size for first, size in zip(start, entry.shape, strict=True))
    whole = None if place.shape is None else tuple(place.shape)
    part = _Part(place.tensor or key, whole, start, stop, entry.dtype, data + entry.data_offsets[0])
    if entry.data_offsets[1] - entry.data_offsets[0] != _bytes(part) or max(stop, default=0) >= 2**62:
        raise _damaged(path, f"{key} has another size than its shape")
    return part


def _bytes(part: _Part) -> int:
    return _DTYPES[part.dtype].itemsize * math.prod(b - a for a, b in zip(part.start, part.stop, strict=True))


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}); {FIX}")
