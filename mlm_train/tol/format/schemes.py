"""How one layer of a token's row is stored: type, rank, groups, and where its fields lie in the row.

codec.py turns numbers into these bytes and back. Here is no torch, so that a command's options are at hand at
once.
"""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from mlm_train.utils.records import Record

PlainDtype = Literal["bfloat16", "float16", "float32"]
Dtype = Literal["bfloat16", "float16", "float32", "int8", "int4"]
PLAIN_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # of a number
LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}  # smallest and largest code
GROUP = 64
GROUPS = (8, 16, 24, 32, 48, 64, 96, 128)  # that are tried where a group size is searched for
_MOST = 2**31 - 1  # of a rank and a group: readers keep them in 32 bits
ALIGNMENT = 16  # wide loads of a GPU want it


class Scheme(Record):
    """How one layer is stored. rank: numbers a row after the cut to low rank; None keeps all."""

    dtype: Dtype
    rank: int | None = Field(default=None, ge=1, le=_MOST)
    group_size: int | None = Field(default=None, ge=1, le=_MOST)
    symmetric: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.group_size is not None) != self.quantised:
            raise ValueError(f"{self.dtype} {'needs a' if self.quantised else 'has no'} group_size")
        return self

    @property
    def quantised(self) -> bool:
        """Whether the numbers are integers."""
        return self.dtype in LEVELS

    def width(self, hidden: int) -> int:
        """Numbers of a row in this layer."""
        return hidden if self.rank is None else self.rank

    def sizes(self, hidden: int) -> tuple[int, int, int]:
        """Bytes of a row's scales, zeros and codes."""
        width = self.width(hidden)
        if self.group_size is None:
            return 0, 0, width * PLAIN_BYTES[self.dtype]
        groups = -(-width // self.group_size)
        return 2 * groups, 0 if self.symmetric else groups, width if self.dtype == "int8" else -(-width // 2)

    def bytes(self, hidden: int) -> int:
        """Bytes of this layer in a row, up to where the next one may begin."""
        return -(-sum(self.sizes(hidden)) // ALIGNMENT) * ALIGNMENT


class Encoding(Scheme):
    """A scheme, and the byte offsets of its fields within a row."""

    scales: int | None = Field(default=None, ge=0)
    zeros: int | None = Field(default=None, ge=0)
    codes: int = Field(ge=0)

    def spans(self, hidden: int) -> list[tuple[int, int]]:
        """[start, stop) in bytes of each field that is there."""
        starts = (self.scales, self.zeros, self.codes)
        fields = zip(starts, self.sizes(hidden), strict=True)
        return [(start, start + size) for start, size in fields if start is not None]

    @model_validator(mode="after")
    def _check_offsets(self) -> Self:
        wanted = (self.quantised, self.quantised and not self.symmetric)
        if (self.scales is not None, self.zeros is not None) != wanted:
            raise ValueError("scales are of int8 and int4, zeros of those that are not symmetric")
        return self


def layout(schemes: Sequence[Scheme], hidden: int) -> list[Encoding]:
    """The layers of a row one after another."""
    encodings, start = [], 0
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
