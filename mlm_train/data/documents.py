"""Read documents from text files, JSON, JSON lines, Parquet, folders of these, and Hugging Face datasets.

Local files are read directly rather than through `datasets`, which would first copy them into its
cache and names neither the file nor the line in its errors. Files are read one document (text file),
line or record batch at a time.
"""

import codecs
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlm_train.data.formats import (
    BROKEN,
    COMPRESSED,
    OF_SUFFIX,
    TABLES,
    Format,
    declared,
    format_of,
    lines_of,
    opened,
    read_all,
    suffix_of,
)
from mlm_train.errors import UserError
from mlm_train.utils.records import json_value

SPLITS = ("train", "validation")
DATA = (Format.LINES, Format.JSON, Format.PARQUET)  # formats that hold many documents
LISTED = 10  # names listed on one line


class Document(NamedTuple):
    """A text, and how many bytes of its source it accounts for (for progress only)."""

    text: str
    size: float


@dataclass(frozen=True)
class TextSource:
    """A file or a dataset. `split` is None where documents are divided by a fraction."""

    name: str
    split: str | None
    size: int | None
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class Inputs:
    """What to read. `left_out`: files skipped in folders, and why; it grows while sources are read."""

    sources: list[TextSource]
    left_out: dict[str, str]


class NoText(UserError):
    """A whole file of a known format holds no text; `reason` is the message without the file's name."""

    def __init__(self, path: Path, reason: str, fix: str) -> None:
        super().__init__(f"input {path} {reason}; {fix}")
        self.reason = reason


def find_sources(inputs: Sequence[str], text_key: str, validation: str | None = None) -> Inputs:
    """Find what to read, in an order that depends on names alone.

    A folder with one train and one validation file keeps its own splits. With `validation` all inputs are
    for training. Raises UserError for an input that cannot be found, and for a named file without text.
    """
    finder = _Finder(text_key, {})
    sources = [source for name in inputs for source in finder.sources_of(name, None)]
    if validation is None:
        return Inputs(sources, finder.left_out)
    presplit = next((source.name for source in sources if source.split), None)
    if presplit:
        raise UserError(
            f"--validation {validation}: {presplit} is part of a folder with its own split; leave it out"
        )
    for_training = [TextSource(s.name, "train", s.size, s.read) for s in sources]
    return Inputs(for_training + finder.sources_of(validation, "validation"), finder.left_out)


@dataclass(frozen=True)
class _Finder:
    """Finds sources by name, and records in `left_out` what it skips in folders."""

    text_key: str
    left_out: dict[str, str]

    def sources_of(self, name: str, split: str | None) -> list[TextSource]:
        path = Path(name)
        if path.is_file():
            file_format = _format_of(path)
            if file_format is None:
                raise UserError(
                    f"input {path} is {_why_unreadable(path)}; give text, {', '.join(OF_SUFFIX)}, these "
                    f"compressed ({' '.join(COMPRESSED)}), or leave it out"
                )
            return [self._file(path, file_format, split, named=True)]
        if path.is_dir():
            return self._folder(path, split)
        is_file_name = declared(path) is not None or path.suffix.lower() in (*TABLES, *COMPRESSED)
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) and not is_file_name:
            return [_hub_source(name, self.text_key, split)]
        raise UserError(f"input {name} does not exist; give a file, a folder or a Hugging Face dataset name")

    def _folder(self, folder: Path, split: str | None) -> list[TextSource]:
        files = sorted(self._files(folder), key=lambda path: path.relative_to(folder).as_posix())
        own = _own_split(folder, files)
        if own is not None:
            used = {split: own[split]} if split else own
            for path in files:
                if path not in own.values():
                    self.left_out[str(path)] = "beside the folder's own train and validation files"
            return [self._file(path, self._format(path), split, named=True) for split, path in used.items()]
        sources = [
            self._file(path, file_format, split, named=False)
            for path in files
            if (file_format := self._format(path)) is not None
        ]
        if not sources:
            raise UserError(
                f"input {folder} holds no text and no {', '.join(OF_SUFFIX)} ({listing(self.left_out)}); "
                "name the files themselves"
            )
        return sources

    def _format(self, path: Path) -> Format | None:
        file_format = _format_of(path)
        if file_format is None:
            self.left_out[str(path)] = _why_unreadable(path)
        return file_format

    def _files(self, folder: Path) -> Iterator[Path]:
        """The regular files below a folder, without hidden ones; links to folders are not followed."""
        for parent, children, names in os.walk(folder):
            for name in [*children, *names]:
                path = Path(parent, name)
                if name.startswith("."):
                    self.left_out[str(path)] = "hidden"
                elif name in children and path.is_symlink():
                    self.left_out[str(path)] = "a link to a folder"
                elif name in names and not path.is_file():
                    self.left_out[str(path)] = "not a regular file"
                elif name in names:
                    yield path
            children[:] = [name for name in children if not name.startswith(".")]

    def _file(self, path: Path, file_format: Format | None, split: str | None, named: bool) -> TextSource:
        """The source of one file. `named`: given by the user, so that NoText is an error."""

        def read() -> Iterator[Document]:
            try:
                if file_format is Format.LINES:
                    yield from _read_json_lines(path, self.text_key)
                elif file_format is Format.PARQUET:
                    yield from _read_parquet(path, self.text_key)
                elif file_format is Format.JSON:
                    yield from _read_json(path, self.text_key)
                else:
                    yield _read_text(path)
            except NoText as error:
                if named or (file_format is Format.TEXT and declared(path) is Format.TEXT):
                    raise
                self.left_out[str(path)] = error.reason
            except BROKEN as error:
                raise UserError(f"input {path} cannot be read: {error or type(error).__name__}") from None

        return TextSource(str(path), split, path.stat().st_size, read)


def listing(left_out: dict[str, str]) -> str:
    """The number of files left out and the first of them, in one line."""
    first = ", ".join(f"{path} ({reason})" for path, reason in itertools.islice(left_out.items(), LISTED))
    more = f" and {len(left_out) - LISTED} more" if len(left_out) > LISTED else ""
    return f"{len(left_out)} left out{': ' if first else ''}{first}{more}"


def _own_split(folder: Path, files: Sequence[Path]) -> dict[str, Path] | None:
    """The train and validation files of a folder that has both; UserError where one is ambiguous."""
    own: dict[str, Path] = {}
    for split in SPLITS:
        data = (path for path in files if path.parent == folder and declared(path) in DATA)
        matching = [path for path in data if path.name.lower().split(".")[0] == split]
        if not matching:
            return None
        if len(matching) > 1:
            names = " and ".join(str(path) for path in matching)
            raise UserError(
                f"input {names}: more than one file for the {split} split; name the files themselves"
            )
        own[split] = matching[0]
    return own


def _format_of(path: Path) -> Format | None:
    try:
        return format_of(path)
    except BROKEN as error:
        raise UserError(f"input {path} cannot be read: {error}") from None


def _why_unreadable(path: Path) -> str:
    """What a file without a known format is."""
    if path.stat().st_size == 0:
        return "empty"
    return "a table of columns" if suffix_of(path) in TABLES else "neither text nor in a known format"


def _read_text(path: Path) -> Document:
    data, size = read_all(path), path.stat().st_size
    fix = "convert it or leave it out"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NoText(path, f"is not UTF-8 (byte {error.start})", fix) from None
    if data.count(0) * 4 > len(data):
        raise NoText(path, f"is not UTF-8 (its {data.count(0)} NUL bytes suggest UTF-16)", fix)
    return Document(text, size)


def _read_json_lines(path: Path, text_key: str) -> Iterator[Document]:
    with opened(path) as (lines, consumed, compressed):
        before = 0
        for number, line in enumerate(lines_of(lines), start=1):
            position = consumed() if compressed else before + len(line)  # consumed() is a system call
            yield from _documents_of_line(line, f"{path}:{number}", text_key, position - before)
            before = position


def _documents_of_line(line: bytes, where: str, text_key: str, size: float) -> Iterator[Document]:
    """One document, or none for a blank line."""
    if not line.strip():
        return
    try:
        record = json_value(line, half_pairs=True)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); repair or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; every line must be like {{{text_key!r}: ...}}")
    yield Document(_text_of(record, text_key, where), size)


def _read_json(path: Path, text_key: str) -> Iterator[Document]:
    """One object with a text, or an array of such objects or of texts, as Hugging Face's `datasets` reads."""
    try:
        value = json_value(read_all(path).removeprefix(codecs.BOM_UTF8), half_pairs=True)
    except ValueError as error:
        raise UserError(f"input {path} is not JSON ({error}); repair it or leave it out") from None
    items = value if isinstance(value, list) else [value]
    for number, item in enumerate(items, start=1):
        record = {text_key: item} if isinstance(item, str) else item
        if number == 1 and not (isinstance(record, dict) and isinstance(record.get(text_key), str)):
            keys = f" (keys: {_names(record)})" if isinstance(record, dict) else ""
            raise NoText(path, f"has no text under {text_key!r}{keys}", "set --text-key, or leave it out")
        where = f"{path} item {number}" if value is items else str(path)
        if not isinstance(record, dict):
            raise UserError(f"{where} is neither an object nor text; repair or remove it")
        yield Document(_text_of(record, text_key, where), path.stat().st_size / len(items))


def _text_of(record: dict[str, Any], text_key: str, where: str) -> str:
    text = record.get(text_key)
    if not isinstance(text, str):
        raise UserError(f"{where} has no text under {text_key!r} (keys: {_names(record)}); set --text-key")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half a surrogate pair, which is not valid text; repair or remove it"
        ) from None
    return text


def _names(record: dict[str, Any]) -> str:
    """The first keys of an object, in one line."""
    first = [key if key.isprintable() else ascii(key) for key in itertools.islice(record, LISTED)]
    return ", ".join(first) + (", ..." if len(record) > LISTED else "") or "none"


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise UserError(
                    f"input {path} has no column {text_key!r} (columns: {', '.join(names)}); set --text-key"
                )
            rows = file.metadata.num_rows
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield Document(_text_of({text_key: text}, text_key, f"{path} row {row}"), size / rows)
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter from a damaged name or text
        raise UserError(f"input {path} is not Parquet: {str(error).splitlines()[0]}") from None


def _hub_source(name: str, text_key: str, split: str | None) -> TextSource:
    """A dataset of the Hugging Face hub (or of its local cache), as NAME or NAME:CONFIGURATION."""
    import datasets

    hub_name, _, configuration = name.partition(":")
    hub_split = split or "train"
    try:
        dataset = datasets.load_dataset(hub_name, configuration or None, split=hub_split)
    except Exception as error:  # the hub's client raises a different type for every cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"input {name} is neither a local file or folder nor a dataset that can be loaded "
            f"({type(error).__name__}: {reason}); check the name and the network, or give a path"
        ) from None
    if text_key not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise UserError(f"dataset {name} has no column {text_key!r} (columns: {columns}); set --text-key")
    size = dataset.info.dataset_size
    bytes_per_row = (size or 0) / max(len(dataset), 1)

    def read() -> Iterator[Document]:
        for row, record in enumerate(dataset.select_columns([text_key]), start=1):
            yield Document(_text_of(record, text_key, f"{name} row {row}"), bytes_per_row)

    return TextSource(name, split, size, read)
