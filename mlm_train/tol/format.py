"""A ToL folder on disk: tol.index.json and token-major partitions of plain numbers.

A partition is a safetensors file with one tensor `rows` [rows, kept layers, hidden]: one contiguous read
serves every layer of a token. Its header is padded so that the data begin at a multiple of 4096 bytes,
which direct reads and large pages want. Rows leave the model's alpha out. The index is written last.
"""

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlm_train.checkpoint.hf_config import read_json
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.files import is_plain_name, listed, sync, write_text

INDEX = "tol.index.json"
TENSOR = "rows"
ALIGNMENT = 4096
REBUILD = "build it again with `mlm-train tol build`"

PlainDtype = Literal["bfloat16", "float16", "float32"]
TORCH_DTYPE: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_SAFETENSORS_DTYPE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Partition(_Record):
    """Rows [start, stop) of the vocabulary in one file of `bytes` bytes, header included."""

    file: str
    rows: tuple[int, int]
    bytes: int
    sha256: str

    @field_validator("file")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not is_plain_name(value):
            raise ValueError("must be a plain file name inside the folder")
        return value


class Source(_Record):
    """What the table was made from. `checkpoint` is the fingerprint of the export."""

    checkpoint: str
    created: str
    tool_version: str


class TolIndex(_Record):
    """tol.index.json; its partitions cover the vocabulary once, in order."""

    format: Literal["mlm-tol"] = "mlm-tol"
    version: Literal[1] = 1
    vocab_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    dtype: PlainDtype
    layers: list[int]
    rank: None = None
    group_size: None = None
    partitions: list[Partition]
    source: Source

    @model_validator(mode="after")
    def _check(self) -> Self:
        kept = self.layers
        if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= self.num_layers:
            raise ValueError(f"layers must be ascending indices below num_layers={self.num_layers}")
        covered = 0
        for partition in self.partitions:
            start, stop = partition.rows
            if start != covered or stop <= start:
                raise ValueError(
                    f"{partition.file} has rows [{start}, {stop}), expected to begin at {covered}"
                )
            covered = stop
        if covered != self.vocab_size:
            raise ValueError(f"rows [{covered}, {self.vocab_size}) are in no partition")
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row."""
        return len(self.layers) * self.hidden_size * TORCH_DTYPE[self.dtype].itemsize


def read_index(folder: Path) -> TolIndex:
    """The index of a ToL folder; UserError for a missing, broken or unknown one."""
    file = folder / INDEX
    tree = read_json(file, REBUILD)
    try:
        return TolIndex.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{file}: {where + ': ' if where else ''}{reason}; {REBUILD}") from None


def write_index(folder: Path, index: TolIndex) -> None:
    """Make a folder a ToL: call it when every partition is in place."""
    write_text(folder / INDEX, json.dumps(index.model_dump(mode="json"), indent=2) + "\n")


def _header(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Length and JSON of a safetensors header, padded with spaces to a multiple of ALIGNMENT."""
    data = torch.Size(shape).numel() * dtype.itemsize
    entry = {"dtype": _SAFETENSORS_DTYPE[dtype], "shape": list(shape), "data_offsets": [0, data]}
    text = json.dumps({"__metadata__": {"format": "pt"}, TENSOR: entry}, separators=(",", ":")).encode()
    total = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)


def draft_pattern(file: str) -> str:
    """Glob of the unfinished copies of a partition; an attempt has its own, so that two cannot mix."""
    return f".{file}.*.part"


def write_partition(
    path: Path, rows: tuple[int, int], layers: int, hidden: int, dtype: torch.dtype, chunks: Iterable[Tensor]
) -> Partition:
    """Write `chunks` [n, layers, hidden] of `dtype`, in row order, as one partition.

    The file appears under its name when it is whole and on disk. Equal chunks give equal bytes.
    """
    assert sys.byteorder == "little", "safetensors data are little-endian"
    header = _header((rows[1] - rows[0], layers, hidden), dtype)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    digest, written = hashlib.sha256(header), len(header)
    try:
        with draft.open("wb") as file:
            file.write(header)
            for chunk in chunks:
                data = chunk.contiguous().view(torch.uint8).numpy().data.cast("B")
                digest.update(data)
                written += file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    draft.rename(path)
    sync(path.parent)
    return Partition(file=path.name, rows=rows, bytes=written, sha256=digest.hexdigest())


def partition_bytes(rows: int, layers: int, hidden: int, dtype: torch.dtype) -> int:
    """Size of a partition's file."""
    return len(_header((rows, layers, hidden), dtype)) + rows * layers * hidden * dtype.itemsize


def map_partition(folder: Path, index: TolIndex, partition: Partition) -> Tensor:
    """A partition's rows, memory-mapped: [rows, kept layers, hidden] of the index's dtype.

    Raises ValueError saying what is wrong when the file is missing, or its size or header disagree with
    the index, and UserError where it is a link that leads out of the folder. The bytes themselves are
    checked by `mlm-train tol verify`, not here.
    """
    path = listed(folder, partition.file, INDEX)
    if not path.is_file():
        raise ValueError("the file is missing")
    size = path.stat().st_size
    if size != partition.bytes:
        raise ValueError(f"the file has {size} bytes, not {partition.bytes}")
    try:
        rows: Tensor = safe_open(path, framework="pt").get_tensor(TENSOR)
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error).replace("\n", " ")) from None
    shape = (partition.rows[1] - partition.rows[0], len(index.layers), index.hidden_size)
    if rows.shape != shape or rows.dtype != TORCH_DTYPE[index.dtype]:
        raise ValueError(f"it holds {list(rows.shape)} {rows.dtype}, not {list(shape)} {index.dtype}")
    return rows


def check_fits(folder: Path, index: TolIndex, config: ModelConfig) -> None:
    """UserError when a ToL cannot be of a model, by its shape; contents are `tol verify --model`'s matter."""
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
                f"{folder} has {name}={getattr(index, name)} and the model {value}: it is of another model"
            )
