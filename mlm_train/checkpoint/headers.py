"""What is where in a checkpoint's files, from their own headers: versions 2 and 3 have no index."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm_train.checkpoint.shards import DTYPES, OFFSETS, Rectangles
from mlm_train.errors import UserError
from mlm_train.utils.files import open_regular, read_at
from mlm_train.utils.records import Count, Record, parse_json, record_of

FIX = "use an older one"
THREADS = 16  # that read headers: each waits for the disk most of the time
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_ITEM_SIZES = {word: dtype.itemsize for dtype, word in DTYPES.items()}


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


def read_headers(folder: Path, paths: Sequence[Path]) -> dict[str, Rectangles]:
    """The rectangles of all files, by tensor; their rows begin with the number of the file.

    Raises UserError for a file that is not whole, and for parts that cannot be of one tensor.
    """
    with ThreadPoolExecutor(min(THREADS, len(paths))) as pool:
        headers = list(pool.map(_parts_of, paths))
    by_name: dict[str, list[tuple[int, _Part]]] = {}
    for number, parts in enumerate(headers):
        for part in parts:
            by_name.setdefault(part.name, []).append((number, part))
    return {name: _rectangles(folder, name, parts) for name, parts in by_name.items()}


def _rectangles(folder: Path, name: str, parts: Sequence[tuple[int, _Part]]) -> Rectangles:
    """A tensor's, from its parts and the numbers of their files."""
    wholes = {part.whole for _, part in parts}
    if wholes == {None} and len({len(part.start) for _, part in parts}) == 1:
        wholes = {tuple(max(ends) for ends in zip(*(part.stop for _, part in parts), strict=True))}
    (whole, *others), dtypes = wholes, {part.dtype for _, part in parts}
    if whole is None or others or len(dtypes) > 1 or not all(_fits(part, whole) for _, part in parts):
        raise UserError(f"checkpoint {folder}: the parts of {name} do not fit together; {FIX}")
    rows = [(number, part.begin, *part.start, *part.stop) for number, part in parts]
    return Rectangles(dtypes.pop(), whole, np.array(rows, np.int64))


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
    if len(start) != len(entry.shape) or entry.dtype not in _ITEM_SIZES or 0 in (entry.shape or [0]):
        raise _damaged(path, f"{key} has no such place or dtype")
    stop = tuple(first + size for first, size in zip(start, entry.shape, strict=True))
    whole = None if place.shape is None else tuple(place.shape)
    part = _Part(place.tensor or key, whole, start, stop, entry.dtype, data + entry.data_offsets[0])
    if entry.data_offsets[1] - entry.data_offsets[0] != _bytes(part) or max(stop, default=0) >= 2**62:
        raise _damaged(path, f"{key} has another size than its shape")
    return part


def _bytes(part: _Part) -> int:
    return _ITEM_SIZES[part.dtype] * math.prod(b - a for a, b in zip(part.start, part.stop, strict=True))


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}); {FIX}")
