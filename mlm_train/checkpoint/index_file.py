"""A checkpoint's file `index`: what is where in the others, so that a load opens none for its header alone.

8 bytes, little-endian: the length of a JSON object, which follows: by tensor its dtype as safetensors spells
it, its shape, and how many rectangles the files have of it. Then their rows, int64, in the same order: number
of the file in the manifest's list, first byte there, first element in the tensor, and its end.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlm_train.checkpoint.headers import FIX
from mlm_train.checkpoint.shards import DTYPES, Rectangles
from mlm_train.errors import UserError
from mlm_train.utils.files import replace_file
from mlm_train.utils.records import Count, FileRecord, Record, parse_json, read_regular, record_of

INDEX = "index"
LARGEST = 2**33  # bytes of an index that is read: 150 million rectangles
_INT64 = np.dtype("<i8")


class _Entry(Record):
    """A tensor in the JSON object."""

    dtype: str
    shape: list[Count]
    rectangles: Count


def merged(files: Sequence[Mapping[str, Rectangles]]) -> dict[str, Rectangles]:
    """The rectangles of all files, by tensor; their rows begin with the number of the file."""
    found: dict[str, list[tuple[int, Rectangles]]] = {}
    for number, places in enumerate(files):
        for name, part in places.items():
            found.setdefault(name, []).append((number, part))
    tensors = {}
    for name, parts in found.items():
        numbers = np.repeat([number for number, _ in parts], [len(part.rows) for _, part in parts])
        rows = np.column_stack([numbers, np.concatenate([part.rows for _, part in parts])])
        tensors[name] = parts[0][1]._replace(rows=rows)
    return tensors


def write_index(folder: Path, tensors: Mapping[str, Rectangles]) -> FileRecord:
    """Write the index of a checkpoint and flush it. Returns its manifest entry."""
    entries = {
        name: {"dtype": dtype, "shape": shape, "rectangles": len(rows)}
        for name, (dtype, shape, rows) in tensors.items()
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    rows = b"".join(part.rows.astype(_INT64).tobytes() for part in tensors.values())
    data = len(text).to_bytes(8, "little") + text + rows
    replace_file(folder / INDEX, data)
    return FileRecord(file=INDEX, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def load_index(path: Path, entry: FileRecord, files: int) -> dict[str, Rectangles]:
    """Read and check the index of so many files. UserError where it is missing or damaged."""
    try:
        data = read_regular(path, LARGEST)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {FIX}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise UserError(f"{path} is damaged: its checksum differs; {FIX}")
    end = 8 + int.from_bytes(data[:8], "little")
    header = parse_json(data[8:end], path, FIX)
    return dict(_tensors(path, header, data, end, files))


def _tensors(
    path: Path, header: Mapping[str, object], data: bytes, at: int, files: int
) -> Iterator[tuple[str, Rectangles]]:
    """The tensors in the bytes of an index, whose rows begin at `at`."""
    for name, value in header.items():
        entry = record_of(_Entry, value if isinstance(value, dict) else {}, path, FIX)
        dims = len(entry.shape)
        count = entry.rectangles * (2 + 2 * dims)
        if not dims or entry.dtype not in DTYPES.values() or at + count * _INT64.itemsize > len(data):
            raise _damaged(path, name)
        rows = np.frombuffer(data, _INT64, count, at).reshape(entry.rectangles, -1)
        start, stop = rows[:, 2 : 2 + dims], rows[:, 2 + dims :]
        if (
            not len(rows)
            or (rows < 0).any()
            or (rows[:, 0] >= files).any()
            or (start >= stop).any()
            or (stop > np.array(entry.shape)).any()
        ):
            raise _damaged(path, name)
        yield name, Rectangles(entry.dtype, tuple(entry.shape), rows)
        at += count * _INT64.itemsize
    if at != len(data):
        raise _damaged(path, "its end")


def _damaged(path: Path, where: str) -> UserError:
    return UserError(f"{path} is damaged (at {where}); {FIX}")
