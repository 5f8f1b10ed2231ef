"""A partition's file: safetensors with one tensor of rows, written by ranges, read by a memory map.

Its header is padded so that the rows begin at a multiple of 4096 bytes, which direct reads and large pages
want. Every layer of a token lies in one contiguous row.
"""

import errno
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlm_train.files import listed, sync
from mlm_train.tol.codec import TORCH_DTYPE
from mlm_train.tol.format import INDEX, Partition, TolIndex

ALIGNMENT = 4096
_DONT_CACHE = 0x80  # RWF_DONTCACHE of Linux 6.14, for pwritev and preadv
_HASHED_AT_ONCE = 2**20  # bytes
_SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class RowShape(NamedTuple):
    """How the tensor of a partition is called and shaped: plain numbers, or encoded bytes."""

    tensor: str
    dtype: str  # in the format's words
    shape: tuple[int, ...]  # of one row
    size: int  # bytes of one row

    @classmethod
    def plain(cls, dtype: str, layers: int, hidden: int) -> Self:
        """`rows` [rows, kept layers, hidden]."""
        size = layers * hidden * TORCH_DTYPE[dtype].itemsize
        return cls("rows", _SAFETENSORS_DTYPE[dtype], (layers, hidden), size)

    @classmethod
    def packed(cls, size: int) -> Self:
        """`packed` uint8 [rows, row_bytes]."""
        return cls("packed", "U8", (size,), size)

    @classmethod
    def of(cls, index: TolIndex) -> Self:
        """That of a table."""
        if index.encodings is None:
            return cls.plain(index.dtype, len(index.layers), index.hidden_size)
        return cls.packed(index.row_bytes)

    def header(self, rows: int) -> bytes:
        """Length and JSON of a safetensors header, padded with spaces to a multiple of ALIGNMENT."""
        data = rows * self.size
        entry = {"dtype": self.dtype, "shape": [rows, *self.shape], "data_offsets": [0, data]}
        tree = {"__metadata__": {"format": "pt"}, self.tensor: entry}
        text = json.dumps(tree, separators=(",", ":")).encode()
        total = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
        return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)

    def file_bytes(self, rows: int) -> int:
        """Size of a partition's file."""
        return len(self.header(rows)) + rows * self.size


DRAFTS = ".*.part"  # glob of files that do not have their name yet


def new_draft(path: Path) -> Path:
    """A name for an unfinished copy of a file; an attempt has its own, so that two cannot mix."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def make_draft(path: Path, shape: RowShape, rows: int) -> None:
    """Make a partition's file: its header, and the space of its rows; a full disk says so here.

    Once, before anybody fills it: where a file system cannot reserve space the C library writes into every
    block, over what another process may be putting there.
    """
    header = shape.header(rows)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.posix_fallocate(file, 0, len(header) + rows * shape.size)
        os.pwrite(file, header, 0)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(file)


class Draft:
    """A made draft that is being filled; every byte is written once. A context manager.

    Several processes may fill one, each its own bytes: equal rows give equal files. Opening makes no file, so
    that a worker of a build that was killed, however late it wakes, leaves nothing in the folder.
    """

    def __init__(self, path: Path, shape: RowShape, rows: int) -> None:
        assert sys.byteorder == "little", "safetensors data are little-endian"
        self.path, self.shape, self.start = path, shape, len(shape.header(rows))
        # Not for reading: NFS would then read whole pages, and write other workers' old bytes back with ours.
        self._file = _Uncached(os.open(path, os.O_WRONLY))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file.number)

    def write(self, row: int, column: int, data: Tensor) -> None:
        """Bytes [column, column + n) of rows from `row` on: uint8 [rows, n]."""
        lines: np.ndarray = data.numpy()
        if data.shape[1] == self.shape.size:
            self._file.write(lines.reshape(-1), self.start + row * self.shape.size)
            return
        # A page that neighbours share would be written to disk once for each of them.
        cached = bool((self.shape.size | column | data.shape[1]) % ALIGNMENT)
        for number, line in enumerate(lines, row):
            self._file.write(line, self.start + number * self.shape.size + column, cached)

    def sync(self) -> None:
        """Have what was written here survive a power cut."""
        os.fsync(self._file.number)


class _Uncached:
    """Reads and writes that leave nothing in the system's page cache, where the system can do that.

    A table may be larger than memory: kept, its pages drive out the weights, and every further page has to
    be made free first. It also sends what is written to disk at once, not all when it is synced.
    """

    def __init__(self, number: int) -> None:
        self.number, self._flags = number, _DONT_CACHE

    def write(self, data: np.ndarray, at: int, cached: bool = False) -> None:
        view = data.data
        while view:
            written = self._tried(os.pwritev, view, at, 0 if cached else self._flags)
            view, at = view[written:], at + written

    def read(self, view: memoryview, at: int) -> int:
        """Fill `view` from there; how many bytes there were."""
        return self._tried(os.preadv, view, at, self._flags)

    def _tried(self, call: Callable[..., int], view: memoryview, at: int, flags: int) -> int:
        try:
            return call(self.number, [view], at, flags)
        except OSError as error:
            if not flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        self._flags = 0  # an older system, or another file system
        return call(self.number, [view], at)


def hash_draft(draft: Path, file: str, rows: tuple[int, int]) -> Partition:
    """A whole draft as the partition `file`: hashed as it lies on disk, where it survives a power cut."""
    digest, size, view = hashlib.sha256(), 0, memoryview(bytearray(_HASHED_AT_ONCE))
    with draft.open("rb+", buffering=0) as whole:
        os.fsync(whole.fileno())
        reader = _Uncached(whole.fileno())
        while count := reader.read(view, size):
            digest.update(view[:count])
            size += count
    return Partition(file=file, rows=rows, bytes=size, sha256=digest.hexdigest())


def name_draft(draft: Path, path: Path) -> None:
    """Give a whole draft its name; only the process that holds the folder does that."""
    draft.rename(path)
    sync(path.parent)


def write_partition(
    path: Path, rows: tuple[int, int], shape: RowShape, chunks: Sequence[Tensor]
) -> Partition:
    """Write `chunks` of rows, [n, ...] of any type, one after another, as one partition."""
    draft, row = new_draft(path), 0
    make_draft(draft, shape, rows[1] - rows[0])
    try:
        with Draft(draft, shape, rows[1] - rows[0]) as file:
            for chunk in chunks:
                file.write(row, 0, chunk.contiguous().view(torch.uint8).flatten(1))
                row += len(chunk)
        partition = hash_draft(draft, path.name, rows)
        name_draft(draft, path)
        return partition
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def map_partition(folder: Path, index: TolIndex, partition: Partition) -> Tensor:
    """A partition's rows, memory-mapped: uint8 [rows, row bytes].

    Raises ValueError saying what is wrong when the file is missing, or its size or header disagree with
    the index, and UserError where it is a link that leads out of the folder. The bytes themselves are
    checked by `mlm-train tol verify`, not here.
    """
    path = listed(folder, partition.file, INDEX)
    if not path.is_file():
        raise ValueError("the file is missing")
    size = path.stat().st_size
    if size != partition.bytes:
        raise ValueError(f"the file has {size} bytes, not {partition.bytes}")
    shape, count = RowShape.of(index), partition.rows[1] - partition.rows[0]
    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_slice(shape.tensor)
            described = (found.get_dtype(), tuple(found.get_shape()))
            rows: Tensor = file.get_tensor(shape.tensor)
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error).replace("\n", " ")) from None
    if described != (shape.dtype, (count, *shape.shape)):
        wanted = f"{[count, *shape.shape]} {shape.dtype}"
        raise ValueError(f"it holds {list(described[1])} {described[0]}, not {wanted}")
    return rows.view(torch.uint8).flatten(1)
