"""The files of a checkpoint: one safetensors file per rank, hashed while it is written.

A file holds rectangles of logical tensors, in the format of torch.distributed.checkpoint: metadata key
OFFSETS has the offset of each. Where a file has several of one tensor, the first has the tensor's name and
the others a name of their own.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator, Sequence
from itertools import accumulate
from pathlib import Path
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlm_train.checkpoint.digests import BLOCK, PIECE, ShardRecord, joined
from mlm_train.model.logical import LogicalSlice
from mlm_train.utils.direct import PAGE, DirectFile, page_aligned
from mlm_train.utils.threads import in_threads

THREADS = 4  # that hash and write, each with a block of its own; more would slow down the steps meanwhile
OFFSETS = "DCP_SHARDING_INFO"  # metadata key of each rectangle's offset, its tensor's name and whole shape
RNG = "rng"  # name of torch's random number state
# As safetensors spells them: those of a checkpoint's tensors, and those that an export may have too.
DTYPES = {
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}
_buffer = local()


class NonFinite(ValueError):
    """A tensor holds infinity or NaN; the message is its name."""


class Rectangles(NamedTuple):
    """Where a file has rectangles of a logical tensor.

    rows: int64 [rectangles, 1 + 2 dims], of each its first byte in the file, its first element and its end.
    """

    dtype: str
    shape: tuple[int, ...]  # of the logical tensor
    rows: np.ndarray


class Written(NamedTuple):
    """A file on disk: its manifest entry, and what it has by tensor."""

    entry: ShardRecord
    places: dict[str, Rectangles]


def write_shard(path: Path, slices: Sequence[LogicalSlice]) -> Generator[None, None, Written]:
    """Write a file to disk by several threads, without another copy of all in memory.

    Yields after each block that is on disk, for its caller to report progress. Raises NonFinite.
    """
    # Larger elements first, as safetensors' own writer does, so that each tensor is aligned.
    slices = sorted(slices, key=lambda part: (-part.tensor.element_size(), part.name, part.offset))
    header = _header(slices)
    contents = [_Contents(header), *map(_Contents.of, slices)]
    ends = list(accumulate(len(part.bytes) for part in contents))

    def write_block(begin: int) -> bytes:
        if not hasattr(_buffer, "block"):
            _buffer.block = page_aligned(BLOCK)
        block, digest = _buffer.block, hashlib.sha256()
        end = min(begin + BLOCK, ends[-1])
        at, number = begin, bisect_right(ends, begin)
        while at < end:
            part, stop = contents[number], min(at + PIECE, end, ends[number])
            piece = block[at - begin : stop - begin]
            first = ends[number] - len(part.bytes)
            np.copyto(piece, part.bytes[at - first : stop - first])
            part.check(piece)
            digest.update(piece)
            at, number = stop, number + (stop == ends[number])
        file.write(block[: -(-(end - begin) // PAGE) * PAGE].data, begin)
        return digest.digest()

    digests = []
    with DirectFile(path) as file:
        for digest in in_threads(write_block, range(0, ends[-1], BLOCK), THREADS):
            digests.append(digest)
            yield
        file.finish(ends[-1])
    entry = ShardRecord(file=path.name, bytes=ends[-1], sha256=joined(digests), block=BLOCK)
    return Written(entry, _places(slices, ends))


class _Contents:
    """Bytes that follow one another in a file: the header, or a tensor's."""

    def __init__(self, contents: bytes | memoryview, name: str = "", is_float: bool = False) -> None:
        self.bytes, self.name, self.is_float = np.frombuffer(contents, np.uint8), name, is_float

    @classmethod
    def of(cls, part: LogicalSlice) -> "_Contents":
        """A tensor's."""
        return cls(bytes_of(part.tensor.contiguous()), part.name, part.tensor.dtype == torch.float32)

    def check(self, piece: np.ndarray) -> None:
        """Raise NonFinite for a piece with infinity or NaN: no run could resume from it."""
        if self.is_float:
            numbers = piece.view(np.float32)
            with np.errstate(all="ignore"):  # the sum of finite numbers may be infinite
                suspect = not np.isfinite(np.add.reduce(numbers))
            if suspect and not np.isfinite(numbers).all():
                raise NonFinite(self.name)


def _places(slices: Sequence[LogicalSlice], begins: Sequence[int]) -> dict[str, Rectangles]:
    """What a file has of each tensor. begins: bytes at which the slices begin."""
    rows: dict[str, list[tuple[int, ...]]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for (name, shape, offset, tensor), begin in zip(slices, begins[: len(slices)], strict=True):
        stop = (first + size for first, size in zip(offset, tensor.shape, strict=True))
        rows.setdefault(name, []).append((begin, *offset, *stop))
        kinds[name] = DTYPES[tensor.dtype], tuple(shape)
    return {name: Rectangles(*kinds[name], np.array(found, np.int64)) for name, found in rows.items()}


def _header(slices: Sequence[LogicalSlice]) -> bytes:
    """The header, its length included, of a file of these tensors."""
    places: dict[str, dict[str, Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    end = 0
    for part in slices:
        seen[part.name] += 1
        key = part.name if seen[part.name] == 1 else f"{part.name}#{seen[part.name]}"
        places[key] = {"saved_offsets": list(part.offset), "tensor": part.name, "shape": list(part.shape)}
        begin, end = end, end + part.tensor.nbytes
        shape, kind = list(part.tensor.shape), DTYPES[part.tensor.dtype]
        entries[key] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {OFFSETS: json.dumps(places), "format": "pt"}} | entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    # torch views no single element of a stride as bytes
    if tensor.dtype == torch.bfloat16:  # which numpy does not have
        tensor = tensor.view(torch.int16)
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
