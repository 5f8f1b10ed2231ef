"""How one layer of a token's row is stored: type, rank, groups, and the offsets of its fields in the row.

codec.py encodes and decodes. This module does not import torch, so that command options load fast.
"""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from mlm_train.utils.records import Record

PlainDtype = Literal["bfloat16", "float16", "float32"]
Dtype = Literal["bfloat16", "float16", "float32", "int8", "int4"]
PLAIN_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # per value
LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}  # smallest and largest code
GROUP = 64
GROUPS = (8, 16, 24, 32, 48, 64, 96, 128)  # group sizes that a search tries
_MAX = 2**31 - 1  # rank and group size: readers keep them in 32 bits
ALIGNMENT = 16  # bytes, for wide GPU loads


class Scheme(Record):
    """How one layer is stored. rank: values per row after the cut to low rank; None: not cut."""

    dtype: Dtype
    rank: int | None = Field(default=None, ge=1, le=_MAX)
    group_size: int | None = Field(default=None, ge=1, le=_MAX)
    symmetric: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.group_size is not None) != self.quantised:
            raise ValueError(f"{self.dtype} {'needs a' if self.quantised else 'has no'} group_size")
        return self

    @property
    def quantised(self) -> bool:
        """Whether the values are stored as integers."""
        return self.dtype in LEVELS

    def width(self, hidden: int) -> int:
        """Stored values per row."""
        return hidden if self.rank is None else self.rank

    def sizes(self, hidden: int) -> tuple[int, int, int]:
        """Bytes per row of the scales, zeros and codes."""
        width = self.width(hidden)
        if self.group_size is None:
            return 0, 0, width * PLAIN_BYTES[self.dtype]
        groups = -(-width // self.group_size)
        return 2 * groups, 0 if self.symmetric else groups, width if self.dtype == "int8" else -(-width // 2)

    def bytes(self, hidden: int) -> int:
        """Bytes per row of this layer, with padding."""
        return -(-sum(self.sizes(hidden)) // ALIGNMENT) * ALIGNMENT


class Encoding(Scheme):
    """A scheme, and the byte offsets of its fields within a row."""

    scales: int | None = Field(default=None, ge=0)
    zeros: int | None = Field(default=None, ge=0)
    codes: int = Field(ge=0)

    def spans(self, hidden: int) -> list[tuple[int, int]]:
        """The byte range [start, stop) of each present field."""
        starts = (self.scales, self.zeros, self.codes)
        fields = zip(starts, self.sizes(hidden), strict=True)
        return [(start, start + size) for start, size in fields if start is not None]

    def moved(self, by: int) -> "Encoding":
        """The encoding with all fields `by` bytes further on."""
        starts = {"scales": self.scales, "zeros": self.zeros, "codes": self.codes}
        return self.model_copy(
            update={name: start + by for name, start in starts.items() if start is not None}
        )

    @model_validator(mode="after")
    def _check_offsets(self) -> Self:
        wanted = (self.quantised, self.quantised and not self.symmetric)
        if (self.scales is not None, self.zeros is not None) != wanted:
            raise ValueError("scales belong to int8 and int4, zeros to those that are not symmetric")
        return self


def layout(schemes: Sequence[Scheme], hidden: int, start: int = 0) -> list[Encoding]:
    """Lay out the layers of a row one after another, from byte `start` on."""
    encodings = []
    for scheme in schemes:
        scales, zeros, _ = scheme.sizes(hidden)
        encodings.append(
            Encoding(
                **scheme.model_dump(include=set(Scheme.model_fields)),
                scales=start if scales else None,
                zeros=start + scales if zeros else None,
                codes=start + scales + zeros,
            )
        )
        start += scheme.bytes(hidden)
    return encodings
