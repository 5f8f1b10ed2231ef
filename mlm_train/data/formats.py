"""A file's format, detected from its content first and from its name where the content is ambiguous.

Names are unreliable: JSON lines are called .json, .ndjson, .JSONL, .txt or part-00000, and compressed files
do not always have the suffix. JSON lines read as plain text would train a model on brackets and keys.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mlm_train.utils.records import json_value

HEAD_BYTES = 1 << 16  # read to detect a format; what is not text further on fails when it is read


class Format(Enum):
    """How a file stores documents."""

    TEXT = "text"  # one document
    LINES = "JSON lines"  # one object per line
    JSON = "JSON"  # one value: an object, or an array of objects or of texts
    PARQUET = "Parquet"


OF_SUFFIX = {
    ".jsonl": Format.LINES,
    ".ndjson": Format.LINES,
    ".json": Format.JSON,
    ".parquet": Format.PARQUET,
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".py"), Format.TEXT),
}
TABLES = (".csv", ".tsv")  # text, but not documents: which column holds the text would be a guess
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# Raised by reading a damaged compressed file; MemoryError: a document does not fit into memory.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError)


class Opened(NamedTuple):
    """A file's bytes, decompressed. `consumed`: bytes of the file read so far (for progress)."""

    stream: BinaryIO
    consumed: Callable[[], int]
    compressed: bool


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a file, decompressing it as its content requires. Raises BROKEN, also while it is read."""
    with path.open("rb") as raw:
        decompress = _decompressor(raw.peek(10)[:10])
        if decompress is None:
            yield Opened(raw, raw.tell, False)
            return
        with decompress(raw) as stream:
            yield Opened(stream, raw.tell, True)


def suffix_of(path: Path) -> str:
    """The suffix of a file's format, in lower case: .jsonl for A.JSONL.gz."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def declared(path: Path) -> Format | None:
    """The format that a file's name declares."""
    return OF_SUFFIX.get(suffix_of(path))


def format_of(path: Path) -> Format | None:
    """The format of a file; None where it is neither text nor in a known format. Raises BROKEN."""
    name = declared(path)
    with opened(path) as (stream, _, compressed):
        head = stream.read(HEAD_BYTES)
        if name is Format.PARQUET or (not compressed and _is_parquet(head, stream)):
            return Format.PARQUET
        if not is_text(head) or suffix_of(path) in TABLES or not head:
            return name  # the reader of a declared format reports what is wrong
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if name is Format.LINES:
        return Format.JSON if start == b"[" else Format.LINES
    if start == b"{" and _begins_with_json_lines(path, sure=name is Format.JSON):
        return Format.LINES
    if name is not Format.JSON and not (start in (b"{", b"[") and _is_json(path)):
        return Format.TEXT
    return Format.JSON


def is_text(head: bytes) -> bool:
    """Whether bytes, which may end inside a character, are UTF-8 without a NUL."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def read_all(path: Path) -> bytes:
    """A file's whole content, decompressed."""
    with opened(path) as (stream, _, _):
        return stream.read()


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a JSON lines file, without a byte order mark."""
    for number, line in enumerate(stream):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _decompressor(magic: bytes) -> Callable[[BinaryIO], BinaryIO] | None:
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open  # type: ignore[return-value]
    if magic.startswith(b"BZh") and magic[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return bz2.open  # type: ignore[return-value]
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.open  # type: ignore[return-value]
    if magic.startswith(b"\x28\xb5\x2f\xfd") or (magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
        return _zstandard  # the second magic: a skippable frame, with which parallel compressors begin
    return None


def _zstandard(raw: BinaryIO) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))


def _is_parquet(head: bytes, stream: BinaryIO) -> bool:
    if not head.startswith(b"PAR1"):
        return False
    stream.seek(-4, io.SEEK_END)
    return stream.read() == b"PAR1"


def _begins_with_json_lines(path: Path, sure: bool) -> bool:
    """Whether the first line is a JSON object by itself, and the next one begins like one.

    `sure`: the name declares JSON, so any second line makes it JSON lines.
    """
    with opened(path) as (stream, _, _):
        lines = (line.strip() for line in lines_of(stream))
        first = next(line for line in lines if line)
        second = next((line for line in lines if line), b"")
    return _parses(first) and (second.startswith(b"{") or (sure and second != b""))


def _is_json(path: Path) -> bool:
    return _parses(read_all(path).removeprefix(codecs.BOM_UTF8))


def _parses(data: bytes) -> bool:
    """Whether bytes are JSON, including JSON that json_value rejects for its content."""
    try:
        json_value(data.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    except ValueError:
        return True
    return True
