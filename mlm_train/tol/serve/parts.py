"""Memory for the rows of one forward pass, in parts: blocks of columns, each complete by itself."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mlm_train.tol.serve.upload import Upload
from mlm_train.tol.storage.direct_io import BLOCK, buffers

# From so many rows on a row comes in up to PARTS parts, all rows' first parts first: the first layer then
# waits for a part of the bytes. A part is at least PART_BYTES: smaller reads are slower per byte.
MANY_ROWS, PARTS, PART_BYTES = 64, 4, 32768


class Parts:
    """Rows uint8 [n, size] as blocks of columns [n, cuts[i + 1] - cuts[i]], filled in one after the other.

    beside: the stream on which filled parts are copied to its device; None: they stay where they are.
    """

    def __init__(self, rows: int, cuts: Sequence[int], beside: torch.Stream | None = None) -> None:
        self.cuts = cuts
        self.blocks = [
            buffers(rows, stop - start, 1, pinned=beside is not None)[0]
            for start, stop in itertools.pairwise(cuts)
        ]
        self._upload = None if beside is None else Upload(self.blocks, beside)

    def of(self, first: int, last: int) -> list[int]:
        """Numbers of the parts that hold bytes [first, last) of the rows."""
        return [
            part
            for part, (start, stop) in enumerate(itertools.pairwise(self.cuts))
            if start < last and first < stop
        ]

    def filled(self, part: int) -> None:
        """All bytes of a part are there; any thread may say so, once."""
        if self._upload is not None:
            self._upload.begin(part)

    def columns(self, first: int, last: int) -> Tensor:
        """Bytes [first, last) of all rows, of filled parts: uint8 [n, last - first]."""
        blocks = self.blocks if self._upload is None else self._upload
        pieces = [
            blocks[part][:, max(first - self.cuts[part], 0) : last - self.cuts[part]]
            for part in self.of(first, last)
        ]
        return _beside_each_other(pieces)

    def rows(self, numbers: Tensor) -> Tensor:
        """Whole rows [len(numbers), size] on the CPU, of filled parts."""
        return _beside_each_other([block.index_select(0, numbers) for block in self.blocks])


def _beside_each_other(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), 1)


def cut(rows: int, size: int) -> list[int]:
    """Where rows of `size` bytes are cut, if so many are read: multiples of BLOCK, and both ends."""
    parts = 1 if rows < MANY_ROWS else max(1, min(PARTS, size // PART_BYTES))
    return [*(size * part // parts // BLOCK * BLOCK for part in range(parts)), size]
