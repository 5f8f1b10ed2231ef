"""The files of a checkpoint: one safetensors file per rank, in the format of torch.distributed.checkpoint.

Its own writer copies a rank's tensors in memory twice, and a checksum would have to read the file again.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

BLOCK = 2**24  # bytes written and hashed at once
OFFSETS = "DCP_SHARDING_INFO"  # metadata key of each part's offsets in its logical tensor
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}  # of a checkpoint's tensors, as safetensors spells them


class ShardWriter(HuggingFaceStorageWriter):
    """Writes a rank's file tensor by tensor, computing its checksum from memory on the way."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.entries: list[dict[str, Any]] = []  # of this rank's file, for the manifest

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors that the plan assigns to this rank."""
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, list[int]] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and item.tensor_data is not None
            tensors[item.index.fqn] = tensor.detach()
            offsets[item.index.fqn] = list(item.tensor_data.chunk.offsets)
        if tensors:
            path = self.folder / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            self.entries = [_write_shard(path, tensors, offsets)]
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [WriteResult(item.index, tensors[item.index.fqn].nbytes, None) for item in plan.items]
        )
        return done


def _write_shard(path: Path, tensors: dict[str, Tensor], offsets: dict[str, list[int]]) -> dict[str, Any]:
    """Write a file to disk. Returns its manifest entry. offsets: of each part in its logical tensor."""
    # Larger elements first, as safetensors' own writer does, so that each tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    saved_offsets = {name: {"saved_offsets": offsets[name]} for name in names}
    header: dict[str, Any] = {"__metadata__": {OFFSETS: json.dumps(saved_offsets), "format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape, kind = list(tensors[name].shape), DTYPES[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    parts += [_bytes_of(tensors[name]) for name in names]
    return {"file": path.name, "bytes": 8 + len(text) + end, "sha256": _write_parts(path, parts)}


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write the parts one after the other and flush them to disk. Returns the SHA-256 of the file."""
    checksum = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), BLOCK):
                block = memoryview(part)[start : start + BLOCK]
                checksum.update(block)
                while block:  # on a disk that fills up, a partial write comes before the error
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return checksum.hexdigest()
