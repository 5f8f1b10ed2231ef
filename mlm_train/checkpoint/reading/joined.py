"""Read a checkpoint's weights by slice, whatever layout wrote them, without a model or process groups.

A file holds rectangular parts of logical tensors: tensor parallelism splits rows or columns, pipeline and
data parallelism distribute whole tensors over the ranks' files. Replicated tensors are written once.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm_train.checkpoint.hf.folder import FolderTensors, open_weights
from mlm_train.checkpoint.shards import DTYPES, OFFSETS
from mlm_train.errors import UserError
from mlm_train.utils.records import Count, FileRecord, Record, parse_json, record_of

WEIGHT = "weight/"  # prefix of weights; the optimizer's moments have others
_FIX = "use an older one"
_TORCH_DTYPE = {word: dtype for dtype, word in DTYPES.items()}


class _Offsets(Record):
    """A part's offsets in its logical tensor, in the file's metadata."""

    saved_offsets: list[Count]


class _Part(NamedTuple):
    """A rectangular part of a logical tensor."""

    stored: Any  # safetensors' slice, read when indexed
    start: Sequence[int]  # offsets in the logical tensor
    shape: Sequence[int]

    @property
    def stop(self) -> list[int]:
        """Ends in the logical tensor."""
        return [first + size for first, size in zip(self.start, self.shape, strict=True)]


class _Joined:
    """A logical tensor in parts, with the interface of a safetensors slice and of the open file."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self._shape = [max(ends) for ends in zip(*(part.stop for part in parts), strict=True)]

    @property
    def whole(self) -> bool:
        """Whether the parts, which do not overlap, cover the tensor."""
        return sum(math.prod(part.shape) for part in self._parts) == math.prod(self._shape)

    def get_slice(self, name: str) -> "_Joined":
        """Itself: it also stands in for the open file."""
        return self

    def get_shape(self) -> list[int]:
        """Shape of the logical tensor."""
        return self._shape

    def get_dtype(self) -> str:
        """Stored dtype as safetensors spells it, such as F32."""
        return self._parts[0].stored.get_dtype()

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of the logical tensor; only the parts that hold some are read."""
        start, stop, _ = rows.indices(self._shape[0])
        count = max(stop - start, 0)
        result = torch.empty(count, *self._shape[1:], dtype=_TORCH_DTYPE[self.get_dtype()])
        for part in self._parts:
            top, bottom = part.start[0], part.stop[0]
            first, last = max(start, top), min(stop, bottom)
            if first < last:
                others = map(slice, part.start[1:], part.stop[1:])
                result[slice(first - start, last - start), *others] = part.stored[first - top : last - top]
        return result


def open_joined(folder: Path, files: Sequence[FileRecord]) -> FolderTensors:
    """The weights of a checkpoint by export name. files: its manifest's, already verified.

    Raises UserError for a file that is not safetensors and for a tensor with missing parts.
    """
    parts: dict[str, list[_Part]] = {}
    for entry in files:
        file = folder / entry.file
        opened = open_weights(file, _FIX)
        offsets = parse_json((opened.metadata() or {}).get(OFFSETS, "{}"), file, _FIX)
        for key in opened.keys():  # noqa: SIM118 (not a dict)
            if key.startswith(WEIGHT):
                stored = opened.get_slice(key)
                shape = stored.get_shape()
                start = [0] * len(shape)
                if key in offsets:
                    start = record_of(_Offsets, offsets[key], file, _FIX).saved_offsets
                parts.setdefault(key.removeprefix(WEIGHT), []).append(_Part(stored, start, shape))
    for name, own_parts in parts.items():
        dimensions = {len(numbers) for part in own_parts for numbers in (part.start, part.shape)}
        if len(dimensions) > 1 or any(part.stored.get_dtype() not in _TORCH_DTYPE for part in own_parts):
            raise UserError(f"checkpoint {folder}: the parts of {name} do not fit together; {_FIX}")
    joined = {name: _Joined(own_parts) for name, own_parts in parts.items()}
    for name, tensor in joined.items():
        if not tensor.whole:
            raise UserError(f"checkpoint {folder}: {name} is incomplete; {_FIX}")
    return FolderTensors(folder, joined, _FIX)
