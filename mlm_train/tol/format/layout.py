"""How the rows of a table are stored, and at which offset each layer lies in a row."""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from mlm_train.tol.format.index import plain_fields, row_bytes
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.format.schemes import (
    GROUPS,
    LEVELS,
    PLAIN_BYTES,
    Dtype,
    Encoding,
    PlainDtype,
    Scheme,
    layout,
)
from mlm_train.utils.records import Record


class TableSpec(Record):
    """How rows are to be stored, as the options ask.

    layers: the kept ones; None keeps all. rank: of every layer. budget: bytes of the whole table, within
    which each layer gets its own rank, and its own type and group size where none is given. schemes: one per
    kept layer, instead of these fields. embedding: the type of x0, where it is stored too.
    """

    dtype: Dtype | None = "bfloat16"
    group_size: int | None = None
    symmetric: bool = True
    layers: list[int] | None = None
    rank: int | None = None
    budget: int | None = None
    schemes: list[Scheme] | None = None
    embedding: PlainDtype | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rank is not None and self.budget is not None:
            raise ValueError("give a rank or a budget")
        _ = self.scheme(self.rank) if self.budget is None else self.searched  # validates the fields
        return self

    def largest(self, layers: int, hidden: int) -> "Layout":
        """The layout that takes the most bytes: no layer is cut, and the type is the largest searched one."""
        kept = list(range(layers)) if self.layers is None else self.layers
        full_rank = [scheme.model_copy(update={"rank": None}) for scheme in self.schemes or ()]
        if not full_rank:
            schemes = self.searched if self.budget is not None else [self.scheme(None)]
            full_rank = [max(schemes, key=lambda scheme: scheme.bytes(hidden))] * len(kept)
        return Layout(hidden_size=hidden, layers=kept, schemes=full_rank, embedding=self.embedding)

    def scheme(self, rank: int | None) -> Scheme:
        """The scheme of a layer of that rank."""
        fields = {"dtype": self.dtype, "group_size": self.group_size, "symmetric": self.symmetric}
        return Scheme.model_validate(fields | {"rank": rank})

    @property
    def searched(self) -> list[Scheme]:
        """The schemes, without ranks, that a layer may get within a budget."""
        quantised = self.group_size is not None or not self.symmetric
        types = [*(() if quantised else PLAIN_BYTES), *LEVELS] if self.dtype is None else [self.dtype]
        given = {"symmetric": self.symmetric}
        return [
            Scheme.model_validate(given | {"dtype": dtype, "group_size": size})
            for dtype in types
            for size in (GROUPS if dtype in LEVELS and self.group_size is None else [self.group_size])
        ]


class Layout(Record):
    """The stored layers, each with its scheme; known once ranks are chosen.

    embedding: the type of x0, which comes before the layers; None: it is not stored.
    """

    hidden_size: int
    layers: list[int]
    schemes: list[Scheme]
    embedding: PlainDtype | None = None

    @classmethod
    def of(cls, spec: TableSpec, layers: int, hidden: int) -> Self:
        """The layout of a spec without a budget."""
        kept = list(range(layers)) if spec.layers is None else spec.layers
        schemes = spec.schemes or [spec.scheme(spec.rank)] * len(kept)
        return cls(hidden_size=hidden, layers=kept, schemes=schemes, embedding=spec.embedding)

    def span(self, layers: Sequence[int]) -> tuple[int, int]:
        """The bytes [start, stop) of neighbouring layers in a row; the first one has the embedding's too."""
        first = self.layers.index(layers[0])
        return self.edges[first] if first else 0, self.edges[first + len(layers)]

    @property
    def plain(self) -> bool:
        """Whether a row is one tensor of one plain type."""
        first = self.schemes[0]
        one = first.dtype in PLAIN_BYTES and first.rank is None and set(self.schemes) == {first}
        return one and self.embedding is None

    @property
    def fields(self) -> list[Encoding]:
        """The encoding of each layer, with its offsets in a row."""
        if self.plain:
            return plain_fields(self.schemes[0].dtype, len(self.schemes), self.hidden_size)
        x0 = self.embedding_field
        return layout(self.schemes, self.hidden_size, 0 if x0 is None else x0.bytes(self.hidden_size))

    @property
    def embedding_field(self) -> Encoding | None:
        """The encoding of the embedding, at the start of a row."""
        if self.embedding is None:
            return None
        return layout([Scheme(dtype=self.embedding)], self.hidden_size)[0]

    @property
    def edges(self) -> list[int]:
        """The byte offset of each layer in a row, and the end of the row."""
        return [*(field.spans(self.hidden_size)[0][0] for field in self.fields), self.shape.size]

    @property
    def shape(self) -> RowShape:
        """Name, type and row shape of a partition's tensor."""
        if self.plain:
            return RowShape.plain(self.schemes[0].dtype, len(self.schemes), self.hidden_size)
        return RowShape.packed(row_bytes(self.fields, self.hidden_size, plain=False))
