"""Where a checkpoint's logical tensors are: which rectangle of which tensor at which byte of which file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mlm_train.checkpoint.headers import FIX, read_headers
from mlm_train.checkpoint.index_file import load_index
from mlm_train.checkpoint.manifest import MANIFEST
from mlm_train.checkpoint.shards import DTYPES, Rectangles
from mlm_train.errors import UserError
from mlm_train.utils.files import listed
from mlm_train.utils.records import FileRecord

_DTYPES = {word: dtype for dtype, word in DTYPES.items()}


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

    @classmethod
    def of(cls, rectangles: Rectangles) -> "Stored":
        """A tensor that has these rectangles, numbered by their files."""
        word, shape, rows = rectangles
        end = 2 + len(shape)
        return cls(shape, _DTYPES[word], rows[:, 2:end], rows[:, end:], rows[:, 0], rows[:, 1])


@dataclass(frozen=True)
class CheckpointIndex:
    """All logical tensors of a checkpoint by name, such as `exp_avg/model.norm.weight`."""

    folder: Path
    files: Sequence[str]
    tensors: Mapping[str, Stored]
    sizes: Sequence[int] | None = None  # of the files; None: compared already

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


def read_index(folder: Path, files: Sequence[FileRecord], index: FileRecord | None = None) -> CheckpointIndex:
    """What is where in a checkpoint's files, which its manifest lists; index: the file that says it, if any.

    Raises UserError for a file that is not whole, and for parts that cannot be of one tensor.
    """
    paths = [listed(folder, entry.file, MANIFEST) for entry in files]
    if index is None:
        tensors = read_headers(folder, paths)
    else:
        tensors = load_index(listed(folder, index.file, MANIFEST), index, len(files))
    stored = {name: Stored.of(part) for name, part in tensors.items()}
    sizes = None if index is None else [entry.bytes for entry in files]
    return CheckpointIndex(folder, [path.name for path in paths], stored, sizes)
