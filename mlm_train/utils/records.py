"""Read JSON files, with all checks in one place.

A file of a run, table or model may be damaged, hostile, or something else altogether. Reading it gives a
checked value, or a one-line error that names the file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlm_train.errors import UserError
from mlm_train.utils.files import open_regular, write_json

LARGEST = 2**28  # default maximum bytes of a file that is read whole
DEEPEST = 64  # levels of brackets; our files have fewer than ten
SEAL = "sha256"  # key of a record's checksum over its other keys

Kind = TypeVar("Kind", bound=BaseModel)


class Record(BaseModel):
    """A JSON object with known fields; unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class FileRecord(Record):
    """A file that a manifest or an index lists: its name, its size, its SHA-256 in hexadecimal."""

    file: str
    bytes: Count
    sha256: str


def read_regular(path: Path, most: int = LARGEST) -> bytes:
    """A file's bytes. Raises as open_regular does, and UserError for a file larger than `most` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise UserError(f"{path} is larger than {most} bytes, which no such file is: name the right one")
        return file.read()


def json_value(data: bytes | str, half_pairs: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError with a short message, whatever is wrong with it.

    `half_pairs`: allow half surrogate pairs in text; the caller checks the text that it uses.
    """
    try:
        value = json.loads(data if isinstance(data, str) else data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"brackets nested more than {DEEPEST} deep") from None
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8") from None
    level = [value]
    for _ in range(DEEPEST):
        if not half_pairs:
            _check_text(level)
        level = [inner for item in level if isinstance(item, dict | list) for inner in _inside(item)]
        if not level:
            return value
    raise ValueError(f"brackets nested more than {DEEPEST} deep")


def _inside(item: dict[str, Any] | list[Any]) -> list[Any]:
    return item if isinstance(item, list) else [*item.keys(), *item.values()]


def _check_text(values: list[Any]) -> None:
    """Raise ValueError for half a surrogate pair, which JSON can spell but nothing can print or write."""
    for value in values:
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{value!r} is not Unicode text") from None


def parse_json(data: bytes | None, file: Path | str, fix: str) -> dict[str, Any]:
    """The JSON object in a file's contents (None: no such file). Else UserError naming file and `fix`."""
    if data is None:
        raise UserError(f"{file} does not exist; {fix}")
    try:
        tree = json_value(data)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); {fix}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} is not a JSON object; {fix}")
    return tree


def read_json(file: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file. UserError naming file and `fix` where it is missing or anything else."""
    try:
        data = read_regular(file)
    except (FileNotFoundError, NotADirectoryError):
        data = None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return parse_json(data, file, fix)


def record_of(kind: type[Kind], tree: dict[str, Any], file: Path | str, fix: str) -> Kind:
    """Validate a JSON object as a record. UserError naming file, field and `fix` where it is invalid."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        where, reason = first_problem(error)
        given = error.errors()[0]["input"]
        value = "" if isinstance(given, dict | list) else f"={repr(given)[:80]}"
        raise UserError(f"{file}: {where + value + ': ' if where else ''}{reason}; {fix}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The first of pydantic's errors: its dotted field name ("" for the whole) and its message."""
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")


def seal_of(tree: dict[str, Any]) -> str:
    """SHA-256 of a record's keys and values, independent of order and white space."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, tree: dict[str, Any]) -> None:
    """Write a record with its own checksum (SEAL), atomically."""
    write_json(path, tree | {SEAL: seal_of(tree)})
