"""A partition's file: safetensors with one tensor of rows, written in ranges and memory-mapped for reading.

Its header is padded so that the rows start at a multiple of 4096 bytes, for direct reads and large pages. All
layers of a token lie in one contiguous row.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlm_train.tol.format.codec import TORCH_DTYPE
from mlm_train.tol.format.index import INDEX, Partition, TolIndex
from mlm_train.tol.storage.direct_io import UncachedFile
from mlm_train.utils.files import listed

ALIGNMENT = 4096
_HASH_BLOCK = 2**20  # bytes
_SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class RowShape(NamedTuple):
    """Name, type and row shape of a partition's tensor: plain values, or encoded bytes."""

    tensor: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]  # of one row
    size: int  # bytes per row

    @classmethod
    def plain(cls, dtype: str, layers: int, hidden: int) -> Self:
        """The tensor `rows` [rows, kept layers, hidden]."""
        size = layers * hidden * TORCH_DTYPE[dtype].itemsize
        return cls("rows", _SAFETENSORS_DTYPE[dtype], (layers, hidden), size)

    @classmethod
    def packed(cls, size: int) -> Self:
        """The tensor `packed`, uint8 [rows, row_bytes]."""
        return cls("packed", "U8", (size,), size)

    @classmethod
    def of(cls, index: TolIndex) -> Self:
        """The row shape of a table."""
        if index.encodings is None:
            return cls.plain(index.dtype, len(index.layers), index.hidden_size)
        return cls.packed(index.row_bytes)

    def header(self, rows: int) -> bytes:
        """The safetensors header (length and JSON) of a partition, padded to a multiple of ALIGNMENT."""
        data = rows * self.size
        entry = {"dtype": self.dtype, "shape": [rows, *self.shape], "data_offsets": [0, data]}
        tree = {"__metadata__": {"format": "pt"}, self.tensor: entry}
        text = json.dumps(tree, separators=(",", ":")).encode()
        total = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
        return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)

    def file_bytes(self, rows: int) -> int:
        """Bytes of the file of a partition with so many rows."""
        return len(self.header(rows)) + rows * self.size


class Draft:
    """An existing draft that is filled some layers at a time, every byte once. A context manager.

    Several processes may fill one, each its own bytes: equal rows give equal files. Opening creates no file,
    so that a worker of a killed build leaves nothing in the folder, however late it wakes.
    """

    def __init__(self, path: Path, shape: RowShape, rows: int) -> None:
        assert sys.byteorder == "little", "safetensors data are little-endian"
        self.shape, self.start = shape, len(shape.header(rows))
        self._file = UncachedFile(path, os.O_WRONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: int, column: int, data: Tensor) -> None:
        """Write data uint8 [rows, n] to bytes [column, column + n) of the rows from `row` on."""
        parts: np.ndarray = data.numpy()
        # Uncached, a page that neighbours share would be written to disk once for each of them.
        cached = bool((self.shape.size | column | data.shape[1]) % ALIGNMENT)
        for number, part in enumerate(parts, row):
            self._file.write(part, self.start + number * self.shape.size + column, cached)

    def sync(self) -> None:
        """Flush the draft to disk."""
        self._file.sync()


def hash_draft(draft: Path, file: str, rows: tuple[int, int]) -> Partition:
    """Flush a complete draft to disk and hash it; return it as the partition `file`."""
    digest, size, view = hashlib.sha256(), 0, memoryview(bytearray(_HASH_BLOCK))
    with UncachedFile(draft, os.O_RDWR) as opened:
        opened.sync()
        while count := opened.read(view, size):
            digest.update(view[:count])
            size += count
    return Partition(file=file, rows=rows, bytes=size, sha256=digest.hexdigest())


def map_partition(folder: Path, index: TolIndex, partition: Partition) -> Tensor:
    """Memory-map a partition's rows: uint8 [rows, row bytes].

    Raises ValueError with the reason if the file is missing or its size or header disagrees with the index,
    and UserError if it is a link that leads out of the folder. `mlm-train tol verify` checks the contents.
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
            tensor = file.get_slice(shape.tensor)
            described = (tensor.get_dtype(), tuple(tensor.get_shape()))
            rows: Tensor = file.get_tensor(shape.tensor)
    except (SafetensorError, OSError, MemoryError) as error:
        raise ValueError(str(error).replace("\n", " ")) from None
    if described != (shape.dtype, (count, *shape.shape)):
        wanted = f"{[count, *shape.shape]} {shape.dtype}"
        raise ValueError(f"it holds {list(described[1])} {described[0]}, not {wanted}")
    return rows.view(torch.uint8).flatten(1)
