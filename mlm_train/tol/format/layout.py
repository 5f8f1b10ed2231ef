"""How the rows of a table are stored, and where each layer lies in a row."""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from mlm_train.tol.format.index import plain_fields, row_bytes
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.format.schemes import GROUPS, LEVELS, PLAIN_BYTES, Dtype, Encoding, Scheme, layout
from mlm_train.utils.records import Record


class TableSpec(Record):
    """How rows are to be stored.

    layers: the kept ones; None keeps all. rank: of every layer; budget: bytes of the whole table, within
    which each layer gets a rank of its own, and a type and a group size where there is none here. schemes:
    one for each kept layer, instead of all others.
    """

    dtype: Dtype | None = "bfloat16"
    group_size: int | None = None
    symmetric: bool = True
    layers: list[int] | None = None
    rank: int | None = None
    budget: int | None = None
    schemes: list[Scheme] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rank is not None and self.budget is not None:
            raise ValueError("give a rank or a budget")
        _ = self.scheme(self.rank) if self.budget is None else self.searched  # which check the fields
        return self

    def largest(self, layers: int, hidden: int) -> "Layout":
        """No layer cut, and of the types that are searched the largest: no layout takes more bytes."""
        kept = list(range(layers)) if self.layers is None else self.layers
        whole = [scheme.model_copy(update={"rank": None}) for scheme in self.schemes or ()]
        if not whole:
            ways = self.searched if self.budget is not None else [self.scheme(None)]
            whole = [max(ways, key=lambda way: way.bytes(hidden))] * len(kept)
        return Layout(hidden_size=hidden, layers=kept, schemes=whole)

    def scheme(self, rank: int | None) -> Scheme:
        """A layer of that rank."""
        fields = {"dtype": self.dtype, "group_size": self.group_size, "symmetric": self.symmetric}
        return Scheme.model_validate(fields | {"rank": rank})

    @property
    def searched(self) -> list[Scheme]:
        """The types and group sizes that a layer may have within a budget, without ranks."""
        quantised = self.group_size is not None or not self.symmetric
        types = [*(() if quantised else PLAIN_BYTES), *LEVELS] if self.dtype is None else [self.dtype]
        given = {"symmetric": self.symmetric}
        return [
            Scheme.model_validate(given | {"dtype": dtype, "group_size": size})
            for dtype in types
            for size in (GROUPS if dtype in LEVELS and self.group_size is None else [self.group_size])
        ]


class Layout(Record):
    """The layers that are stored, each with its scheme; known once ranks are chosen."""

    hidden_size: int
    layers: list[int]
    schemes: list[Scheme]

    @classmethod
    def of(cls, spec: TableSpec, layers: int, hidden: int) -> Self:
        """That of a storage whose ranks are known."""
        kept = list(range(layers)) if spec.layers is None else spec.layers
        schemes = spec.schemes or [spec.scheme(spec.rank)] * len(kept)
        return cls(hidden_size=hidden, layers=kept, schemes=schemes)

    def bytes_of(self, layers: Sequence[int]) -> int:
        """Bytes of some neighbouring layers in a row."""
        first = self.layers.index(layers[0])
        return self.edges[first + len(layers)] - self.edges[first]

    @property
    def plain(self) -> bool:
        """Whether a row is one tensor of one plain type."""
        first = self.schemes[0]
        return first.dtype in PLAIN_BYTES and first.rank is None and set(self.schemes) == {first}

    @property
    def fields(self) -> list[Encoding]:
        """Where each layer lies in a row."""
        if self.plain:
            return plain_fields(self.schemes[0].dtype, len(self.schemes), self.hidden_size)
        return layout(self.schemes, self.hidden_size)

    @property
    def edges(self) -> list[int]:
        """Where each layer begins in a row, in bytes, and where the row ends."""
        return [*(field.spans(self.hidden_size)[0][0] for field in self.fields), self.shape.size]

    @property
    def shape(self) -> RowShape:
        """Of a partition's tensor."""
        if self.plain:
            return RowShape.plain(self.schemes[0].dtype, len(self.schemes), self.hidden_size)
        return RowShape.packed(row_bytes(self.fields, self.hidden_size, plain=False))
