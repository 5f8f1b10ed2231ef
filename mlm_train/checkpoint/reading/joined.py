"""Reading a checkpoint's weights by slice, whatever layout wrote them: no model, no process groups.

A file holds rectangles of logical tensors: tensor parallelism cuts rows or columns, pipeline and data
parallelism deal whole tensors out to the ranks' files. What several ranks hold alike is written once.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm_train.checkpoint.hf.folder import FolderTensors, open_weights
from mlm_train.checkpoint.manifest import Count, FileEntry
from mlm_train.checkpoint.shards import DTYPES, PLACES
from mlm_train.errors import UserError
from mlm_train.utils.records import Record, parse_json, record_of

WEIGHT = "weight/"  # before the names of weights; the optimizer's moments have others
_FIX = "use an older one"
_TORCH_DTYPE = {word: dtype for dtype, word in DTYPES.items()}


class _Place(Record):
    """Where a part begins in its logical tensor, as the file's metadata say it."""

    saved_offsets: list[Count]


class _Part(NamedTuple):
    """A rectangle of a logical tensor."""

    stored: Any  # safetensors' slice: read where it is indexed
    start: Sequence[int]  # where it begins in the logical tensor
    shape: Sequence[int]

    @property
    def stop(self) -> list[int]:
        """Where it ends there."""
        return [first + size for first, size in zip(self.start, self.shape, strict=True)]


class _Joined:
    """A logical tensor in parts; to be read as safetensors' slice of a whole one is."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self._shape = [max(ends) for ends in zip(*(part.stop for part in parts), strict=True)]

    @property
    def whole(self) -> bool:
        """Whether the parts, which do not overlap, leave nothing out."""
        return sum(math.prod(part.shape) for part in self._parts) == math.prod(self._shape)

    def get_slice(self, name: str) -> "_Joined":
        """Itself: in place of an open file."""
        return self

    def get_shape(self) -> list[int]:
        """Of the logical tensor."""
        return self._shape

    def get_dtype(self) -> str:
        """In the format's words, such as F32."""
        return self._parts[0].stored.get_dtype()

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of the logical tensor, out of the parts that hold some; nothing else is read."""
        start, stop, _ = rows.indices(self._shape[0])
        count = max(stop - start, 0)
        found = torch.empty(count, *self._shape[1:], dtype=_TORCH_DTYPE[self.get_dtype()])
        for part in self._parts:
            top, bottom = part.start[0], part.stop[0]
            first, last = max(start, top), min(stop, bottom)
            if first < last:
                others = map(slice, part.start[1:], part.stop[1:])
                found[slice(first - start, last - start), *others] = part.stored[first - top : last - top]
        return found


def open_joined(folder: Path, files: Sequence[FileEntry]) -> FolderTensors:
    """The weights of a checkpoint whose files, those of its manifest, are verified, by export name.

    Raises UserError for a file that is no safetensors file and for a tensor of which parts are missing.
    """
    parts: dict[str, list[_Part]] = {}
    for entry in files:
        file = folder / entry.file
        opened = open_weights(file, _FIX)
        places = parse_json((opened.metadata() or {}).get(PLACES, "{}"), file, _FIX)
        for key in opened.keys():  # noqa: SIM118 (it is no dict)
            if key.startswith(WEIGHT):
                stored = opened.get_slice(key)
                shape = stored.get_shape()
                start = [0] * len(shape)
                if key in places:
                    start = record_of(_Place, places[key], file, _FIX).saved_offsets
                parts.setdefault(key.removeprefix(WEIGHT), []).append(_Part(stored, start, shape))
    for name, found in parts.items():
        ranks = {len(numbers) for part in found for numbers in (part.start, part.shape)}
        if len(ranks) > 1 or any(part.stored.get_dtype() not in _TORCH_DTYPE for part in found):
            raise UserError(f"checkpoint {folder}: the parts of {name} do not go together; {_FIX}")
    joined = {name: _Joined(found) for name, found in parts.items()}
    for name, tensor in joined.items():
        if not tensor.whole:
            raise UserError(f"checkpoint {folder}: {name} is incomplete; {_FIX}")
    return FolderTensors(folder, joined, _FIX)
