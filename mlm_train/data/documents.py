"""Documents out of text files, JSON lines, Parquet, folders of these, and Hugging Face datasets.

Local files are read directly rather than through `datasets`: it would first copy them into its
cache, and its errors name neither the file nor the line. Files are read one document (text file),
line or record batch at a time.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlm_train.errors import UserError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
SPLITS = ("train", "validation")


class Document(NamedTuple):
    """A text, and the bytes of its source that it accounts for (for progress only)."""

    text: str
    size: float


@dataclass(frozen=True)
class Source:
    """A file or a dataset. `split` is None where documents are divided by a fraction."""

    name: str
    split: str | None
    size: int | None
    read: Callable[[], Iterator[Document]]


def find_sources(inputs: Sequence[str], text_key: str, validation: str | None = None) -> list[Source]:
    """What to read, in an order that depends on names alone.

    A folder with train.jsonl and validation.jsonl brings its own splits. With `validation` all
    inputs are for training. Raises UserError for anything that cannot be found.
    """
    sources = [source for name in inputs for source in _sources_of(name, text_key, None)]
    if validation is None:
        return sources
    own = next((source.name for source in sources if source.split), None)
    if own:
        raise UserError(
            f"--validation {validation}: {own} is part of a folder with its own split; leave it out"
        )
    for_training = [Source(s.name, "train", s.size, s.read) for s in sources]
    return for_training + _sources_of(validation, text_key, "validation")


def _sources_of(name: str, text_key: str, split: str | None) -> list[Source]:
    path = Path(name)
    if path.is_file():
        return [_file_source(path, text_key, split)]
    if path.is_dir():
        return _folder_sources(path, text_key, split)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) and not _is_data_file(path):
        return [_hub_source(name, text_key, split)]
    raise UserError(f"input {name} does not exist; give a file, a folder or a Hugging Face dataset name")


def _folder_sources(folder: Path, text_key: str, split: str | None) -> list[Source]:
    own = {name: folder / f"{name}.jsonl" for name in SPLITS}
    if all(path.is_file() for path in own.values()):
        if split:
            return [_file_source(own[split], text_key, split)]
        return [_file_source(path, text_key, name) for name, path in own.items()]
    files = [path for path in folder.rglob("*") if _is_data_file(path) and path.is_file()]
    if not files:
        kinds = " ".join((".jsonl", ".jsonl.gz", ".parquet", *TEXT_SUFFIXES))
        raise UserError(f"input {folder} holds no file of a known kind ({kinds}); name the files themselves")
    files.sort(key=lambda path: path.relative_to(folder).as_posix())
    return [_file_source(path, text_key, split) for path in files]


def _is_data_file(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz", ".parquet", *TEXT_SUFFIXES))


def _file_source(path: Path, text_key: str, split: str | None) -> Source:
    def read() -> Iterator[Document]:
        try:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _read_json_lines(path, text_key)
            elif path.suffix == ".parquet":
                yield from _read_parquet(path, text_key)
            else:
                yield _read_text(path)
        except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
            raise UserError(f"input {path} cannot be read: {error}") from None
        except MemoryError:
            raise UserError(f"input {path} holds a document that is too large for the memory: split it") from None

    return Source(str(path), split, path.stat().st_size, read)


def _read_text(path: Path) -> Document:
    data = path.read_bytes()
    try:
        return Document(data.decode("utf-8"), len(data))
    except UnicodeDecodeError as error:
        raise UserError(
            f"input {path} is not UTF-8 (byte {error.start}); convert it or leave it out"
        ) from None


def _read_json_lines(path: Path, text_key: str) -> Iterator[Document]:
    if path.suffix == ".gz":
        with path.open("rb") as raw, gzip.open(raw) as lines:
            before = 0
            for number, line in enumerate(lines, start=1):
                position = raw.tell()  # of the compressed file: its size is what progress counts
                yield from _documents_of_line(line, f"{path}:{number}", text_key, position - before)
                before = position
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield from _documents_of_line(line, f"{path}:{number}", text_key, len(line))


def _documents_of_line(line: bytes, where: str, text_key: str, size: float) -> Iterator[Document]:
    """One document, or none for a blank line."""
    if not line.strip():
        return
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); repair or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; every line must be like {{{text_key!r}: ...}}")
    yield Document(_text_of(record, text_key, where), size)


def _text_of(record: dict[str, Any], text_key: str, where: str) -> str:
    text = record.get(text_key)
    if not isinstance(text, str):
        found = ", ".join(map(str, record)) or "none"
        raise UserError(f"{where} has no text under {text_key!r} (keys: {found}); set --text-key")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half a surrogate pair, which is no text; repair or remove it"
        ) from None
    return text


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
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the second: of a damaged name or text
        raise UserError(f"input {path} is not Parquet: {str(error).splitlines()[0]}") from None


def _hub_source(name: str, text_key: str, split: str | None) -> Source:
    """A dataset of the Hugging Face hub (or of its local cache), as NAME or NAME:CONFIGURATION."""
    import datasets

    hub_name, _, configuration = name.partition(":")
    hub_split = split or "train"
    try:
        dataset = datasets.load_dataset(hub_name, configuration or None, split=hub_split)
    except Exception as error:  # the hub's client raises a different type for every cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"input {name} is neither a file or folder here nor a dataset that can be loaded "
            f"({type(error).__name__}: {reason}); check the name and the network, or give a path"
        ) from None
    if text_key not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise UserError(f"dataset {name} has no column {text_key!r} (columns: {columns}); set --text-key")
    size = dataset.info.dataset_size
    share = (size or 0) / max(len(dataset), 1)

    def read() -> Iterator[Document]:
        for row, record in enumerate(dataset.select_columns([text_key]), start=1):
            yield Document(_text_of(record, text_key, f"{name} row {row}"), share)

    return Source(name, split, size, read)
