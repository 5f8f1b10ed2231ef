"""JSON that this program did not just write: read in one place, checked whole before anything believes it.

A file of a run, table or model may be damaged, hostile, or something else altogether. Whatever it holds, what
comes out is a value, or one line that names the file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mlm_train.errors import UserError
from mlm_train.utils.files import open_regular

LARGEST = 2**28  # bytes of a file that is read whole, where nothing else is said
DEEPEST = 64  # levels of brackets: none of our files has ten
SEAL = "sha256"  # of a record's other keys

Kind = TypeVar("Kind", bound=BaseModel)


class Record(BaseModel):
    """What stands in JSON; fields that nobody knows are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_regular(path: Path, most: int = LARGEST) -> bytes:
    """A file's bytes. Raises FileNotFoundError and the like as open does, UserError as open_regular does.

    `most`: bytes; a larger file is refused and not read.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise UserError(f"{path} is larger than {most} bytes, which no such file is: name the right one")
        return file.read()


def json_value(data: bytes | str, half_pairs: bool = False) -> Any:
    """The value that JSON text stands for. Raises ValueError, whatever is wrong with it, in few words.

    `half_pairs`: text may hold half a surrogate pair; the caller looks at what it takes.
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
    """JSON can spell half of a surrogate pair, which nothing can print or write."""
    for value in values:
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{value!r} is not Unicode text") from None


def parse_json(data: bytes | None, file: Path | str, fix: str) -> dict[str, Any]:
    """A file's contents (None: it is not there), a JSON object; UserError naming file and `fix` otherwise."""
    if data is None:
        raise UserError(f"{file} does not exist; {fix}")
    try:
        tree = json_value(data)
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); {fix}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no JSON object; {fix}")
    return tree


def read_json(file: Path, fix: str) -> dict[str, Any]:
    """A JSON file whose top level is an object; UserError naming the file and `fix` otherwise."""
    try:
        data = read_regular(file)
    except (FileNotFoundError, NotADirectoryError):
        data = None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return parse_json(data, file, fix)


def record_of(kind: type[Kind], tree: dict[str, Any], file: Path | str, fix: str) -> Kind:
    """A JSON object as the record that it should be; UserError naming file, field and `fix` otherwise."""
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
    """Where the first of pydantic's findings is, dotted ("" for the whole), and what is wrong there."""
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")


def seal_of(tree: dict[str, Any]) -> str:
    """SHA-256 of what a record says, whatever the order and the spaces."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
