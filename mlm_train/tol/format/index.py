"""The index of a ToL folder, tol.index.json; partitions hold one contiguous row per token for all layers.

docs/tol-format.md describes the format for readers in any language. Rows do not include the model's alpha.
The index is written last.
"""

import hashlib
import itertools
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.tol.format.schemes import PLAIN_BYTES, Dtype, Encoding, PlainDtype, Scheme
from mlm_train.utils.files import is_plain_name
from mlm_train.utils.records import FileRecord, Record

INDEX = "tol.index.json"
STATE = "tol.build.json"  # exists while a build is unfinished
FETCHED = "tol.fetch.json"  # the index of a table that is being copied, until all its files are there
BASIS = "basis.safetensors"
BASIS_ITEM = 2  # bytes per value of a basis, float16
X0 = -1  # the number by which readers ask for the embedding, as for a layer before the first
REBUILD = "build it again with `mlm-train tol build`"


class TableFile(FileRecord):
    """A file in the folder of a table."""

    @field_validator("file")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not is_plain_name(value):
            raise ValueError("must be a plain file name inside the folder")
        return value


def file_of(name: str, data: bytes) -> TableFile:
    """The TableFile of a small file with these contents."""
    return TableFile(file=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class Partition(TableFile):
    """Rows [start, stop) of the vocabulary."""

    rows: tuple[int, int]


class Provenance(Record):
    """What the table was built from, and how, so that a partition can be rebuilt.

    checkpoint: fingerprint of the model. table: SHA-256 of the index of the table that was compressed, or
    None. compute: type of FFN-M's matmuls. chunk_rows: rows per matmul. threads: per worker. text: the
    fingerprint of the data by whose tokens low rank was chosen, or None.
    """

    checkpoint: str
    created: str
    tool_version: str
    table: str | None = None
    compute: PlainDtype = "float32"
    chunk_rows: int | None = Field(default=None, ge=1)
    threads: int = Field(default=1, ge=1)
    text: str | None = None


class TolIndex(Record):
    """tol.index.json; its partitions cover the vocabulary once, in order.

    encodings: one per kept layer; None if all layers have one plain type, in a tensor [rows, layers, hidden].
    embedding: of x0, in a table that has it.
    errors: relative error of each kept layer against the values that were encoded, where measured.
    """

    format: Literal["mlm-tol"] = "mlm-tol"
    version: Literal[1] = 1
    vocab_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    dtype: Dtype | Literal["mixed"]
    layers: list[int]
    rank: list[int | None] | None = None
    group_size: int | None = None
    encodings: list[Encoding] | None = None
    embedding: Encoding | None = None
    errors: list[float | None] | None = None
    basis: TableFile | None = None
    partitions: list[Partition]
    source: Provenance

    @model_validator(mode="after")
    def _check(self) -> Self:
        kept = self.layers
        if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= self.num_layers:
            raise ValueError(f"layers must be ascending indices below num_layers={self.num_layers}")
        if self.encodings is None:
            self._check_plain()
        else:
            self._check_encodings(self.encodings)
        if self.errors is not None and len(self.errors) != len(kept):
            raise ValueError(f"{len(self.errors)} errors are given for {len(kept)} layers")
        self._check_coverage()
        return self

    def _check_plain(self) -> None:
        if self.dtype not in PLAIN_BYTES or self.rank is not None or self.basis is not None:
            raise ValueError(f"dtype {self.dtype} with rank {self.rank} needs encodings")
        if self.embedding is not None:
            raise ValueError("an embedding needs encodings")

    def _check_encodings(self, encodings: list[Encoding]) -> None:
        if len(encodings) != len(self.layers):
            raise ValueError(f"{len(encodings)} encodings are given for {len(self.layers)} layers")
        if self.embedding is not None and (self.embedding.quantised or self.embedding.rank is not None):
            raise ValueError("an embedding must have a plain type, and no rank")
        spans = sorted(span for field in self.stored.values() for span in field.spans(self.hidden_size))
        if any(stop > start for (_, stop), (start, _) in itertools.pairwise(spans)):
            raise ValueError("fields of encodings overlap")
        if spans[-1][1] > self.row_bytes:
            raise ValueError("fields of encodings lie beyond the row")
        for field, value in summary(encodings).items():
            if getattr(self, field) != value:
                raise ValueError(f"{field} is {getattr(self, field)}, but {value} in encodings")
        ranks = [encoding.rank for encoding in encodings if encoding.rank is not None]
        if any(rank > self.hidden_size for rank in ranks):
            raise ValueError(f"a rank is larger than hidden_size={self.hidden_size}")
        if bool(ranks) != (self.basis is not None):
            raise ValueError("a basis must be there if, and only if, a layer has a rank")

    def _check_coverage(self) -> None:
        covered = 0
        for partition in self.partitions:
            start, stop = partition.rows
            if start != covered or stop <= start:
                raise ValueError(
                    f"{partition.file} has rows [{start}, {stop}), expected to start at {covered}"
                )
            covered = stop
        if covered != self.vocab_size:
            raise ValueError(f"rows [{covered}, {self.vocab_size}) are in no partition")

    @property
    def fields(self) -> list[Encoding]:
        """The encoding of each kept layer, plain ones too."""
        if self.encodings is not None:
            return self.encodings
        return plain_fields(self.dtype, len(self.layers), self.hidden_size)

    @property
    def stored(self) -> dict[int, Encoding]:
        """The encoding of each kept layer by its number, and of the embedding, if there is one, by X0."""
        layers = dict(zip(self.layers, self.fields, strict=True))
        return layers if self.embedding is None else {X0: self.embedding} | layers

    @property
    def embedding_dtype(self) -> PlainDtype | None:
        """The type of the embedding; None in a table without it."""
        dtype = None if self.embedding is None else self.embedding.dtype
        assert dtype != "int8" and dtype != "int4"
        return dtype

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return row_bytes(list(self.stored.values()), self.hidden_size, self.encodings is None)

    @property
    def repair(self) -> str:
        """The command that rebuilds damaged partitions."""
        command = "compress TABLE" if self.source.table else "build MODEL"
        return f"`mlm-train tol {command} --output DIR --repair`"

    @property
    def files(self) -> list[TableFile]:
        """All files except the index."""
        return [*([self.basis] if self.basis else []), *self.partitions]

    @property
    def bytes(self) -> int:
        """Bytes of all files except the index."""
        return sum(file.bytes for file in self.files)


def plain_fields(dtype: str, layers: int, hidden: int) -> list[Encoding]:
    """The encodings of the layers of a row that is one tensor [layers, hidden] of a plain type."""
    size = hidden * PLAIN_BYTES[dtype]
    return [Encoding(dtype=dtype, codes=position * size) for position in range(layers)]


def row_bytes(fields: list[Encoding], hidden: int, plain: bool) -> int:
    """Bytes per row: up to the end of the last layer, with its padding unless `plain`."""
    if plain:
        return sum(sum(field.sizes(hidden)) for field in fields)
    starts = [min(field.spans(hidden))[0] for field in fields]
    return max(start + field.bytes(hidden) for start, field in zip(starts, fields, strict=True))


def schemes_of(fields: list[Encoding]) -> list[Scheme]:
    """The schemes of encodings, without their offsets."""
    return [Scheme(**field.model_dump(include=set(Scheme.model_fields))) for field in fields]


def summary(schemes: list[Encoding] | list[Scheme]) -> dict[str, object]:
    """The index's fields dtype, rank and group_size for these layers."""
    dtypes = {scheme.dtype for scheme in schemes}
    groups = {scheme.group_size for scheme in schemes}
    ranks = [scheme.rank for scheme in schemes]
    return {
        "dtype": dtypes.pop() if len(dtypes) == 1 else "mixed",
        "rank": ranks if any(rank is not None for rank in ranks) else None,
        "group_size": groups.pop() if len(groups) == 1 else None,
    }


def check_fits(folder: Path, index: TolIndex, config: ModelConfig) -> None:
    """Raise a UserError if a ToL's shape is not the model's; `tol verify --model` checks its contents."""
    if not config.has_memory:
        raise UserError(f"{folder}: a base model has no FFN-M to look up; leave the ToL out")
    wanted = {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
    }
    for name, value in wanted.items():
        if getattr(index, name) != value:
            raise UserError(
                f"{folder} has {name}={getattr(index, name)} and the model {value}: give the table's model"
            )
    if index.embedding is not None and config.tie_word_embeddings:
        raise UserError(
            f"{folder} has embeddings, and the model ties its own to its head: give the table's model"
        )
