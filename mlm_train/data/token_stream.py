"""The tokens of one split, memory-mapped."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mlm_train.data.manifest import SplitRecord


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split, one document after another, memory-mapped."""

    bin_path: Path
    idx_path: Path
    record: SplitRecord
    dtype: str

    def __len__(self) -> int:
        """Number of tokens."""
        return self.record.tokens

    @cached_property
    def tokens(self) -> np.ndarray:
        """Read-only memory map [tokens] of `dtype`; copy what must outlive the stream."""
        return np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]."""
        lengths = np.fromfile(
            self.idx_path, dtype="<i4", count=self.record.documents, offset=INDEX_HEADER.itemsize
        )
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


INDEX_HEADER = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("documents", "<u8")]
)
"""Header of an .idx file; int32 lengths, int64 byte offsets and int64 document boundaries follow."""


DTYPE_CODES = {"int32": 4, "uint16": 8}  # as in megatron-core
