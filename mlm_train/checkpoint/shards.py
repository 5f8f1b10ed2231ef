"""The files of a checkpoint: one safetensors file per rank, hashed while it is written.

A file holds rectangles of logical tensors, in the format of torch.distributed.checkpoint: metadata key
OFFSETS has the offset of each. Where a file has several of one tensor, the first has the tensor's name and
the others a name of their own.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_train.model.logical import LogicalSlice

BLOCK = 2**24  # bytes written and hashed, or read, at once
OFFSETS = "DCP_SHARDING_INFO"  # metadata key of each rectangle's offset, its tensor's name and whole shape
RNG = "rng"  # name of torch's random number state
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}  # of a checkpoint's tensors, as safetensors spells them


def write_shard(path: Path, slices: Sequence[LogicalSlice]) -> dict[str, Any]:
    """Write a file to disk, without another copy of all in memory. Returns its manifest entry."""
    # Larger elements first, as safetensors' own writer does, so that each tensor is aligned.
    slices = sorted(slices, key=lambda part: (-part.tensor.element_size(), part.name, part.offset))
    header, end = _header(slices)
    parts = (bytes_of(part.tensor.contiguous()) for part in slices)
    return {"file": path.name, "bytes": len(header) + end, "sha256": _write_parts(path, header, parts)}


def _header(slices: Sequence[LogicalSlice]) -> tuple[bytes, int]:
    """A file's header, its length included, and the bytes of the tensors that follow."""
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
    return len(text).to_bytes(8, "little") + text, end


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    # torch views no single element of a stride as bytes
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]


def _write_parts(path: Path, header: bytes, parts: Iterable[memoryview]) -> str:
    """Write header and parts one after the other and flush them to disk. Returns the SHA-256 of the file."""
    checksum = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, "checksum") as pool:
        for part in chain((memoryview(header),), parts):
            for start in range(0, len(part), BLOCK):
                block = part[start : start + BLOCK]
                hashed = pool.submit(checksum.update, block)  # meanwhile the block is written
                while block:  # on a disk that fills up, a partial write comes before the error
                    block = block[file.write(block) :]
                hashed.result()
        os.fsync(file.fileno())
    return checksum.hexdigest()
