"""What a file is, told by its content first and by its name where that leaves it open.

Names lie: JSON lines are called .json, .ndjson, .JSONL, .txt or part-00000, and what is compressed is not
always called so. Taken for plain text, a file of JSON lines would train a model on brackets and keys.
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

HEAD_BYTES = 1 << 16  # of a file whose name says nothing: what is no text shows it here, or when it is read


class Format(Enum):
    """How documents lie in a file."""

    TEXT = "text"  # one document
    LINES = "JSON lines"  # an object a line
    JSON = "JSON"  # one value: an object, or an array of objects or of texts
    PARQUET = "Parquet"


OF_SUFFIX = {
    ".jsonl": Format.LINES,
    ".ndjson": Format.LINES,
    ".json": Format.JSON,
    ".parquet": Format.PARQUET,
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".py"), Format.TEXT),
}
TABLES = (".csv", ".tsv")  # text, but no documents: which column is the text would be a guess
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# What reading a damaged compressed file raises; the last, a document that is larger than the memory.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError)


class Opened(NamedTuple):
    """A file's bytes, decompressed. `consumed`: how many of its own bytes were read so far (progress)."""

    stream: BinaryIO
    consumed: Callable[[], int]
    compressed: bool


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a file; what it is compressed with says its content. Raises BROKEN, also while it is read."""
    with path.open("rb") as raw:
        decompress = _decompressor(raw.peek(10)[:10])
        if decompress is None:
            yield Opened(raw, raw.tell, False)
            return
        with decompress(raw) as stream:
            yield Opened(stream, raw.tell, True)


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: .jsonl of A.JSONL.gz."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def declared(path: Path) -> Format | None:
    """What a file's name says that it is."""
    return OF_SUFFIX.get(suffix_of(path))


def format_of(path: Path) -> Format | None:
    """What a file is; None where it is neither text nor of a known format. Raises BROKEN."""
    name = declared(path)
    with opened(path) as (stream, _, compressed):
        head = stream.read(HEAD_BYTES)
        if name is Format.PARQUET or (not compressed and _is_parquet(head, stream)):
            return Format.PARQUET
        if not is_text(head) or suffix_of(path) in TABLES or not head:
            return name  # where it names a format, that one's reader says what is wrong
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if name is Format.LINES:
        return Format.JSON if start == b"[" else Format.LINES
    if start == b"{" and _begins_with_json_lines(path, sure=name is Format.JSON):
        return Format.LINES
    if name is not Format.JSON and not (start in (b"{", b"[") and _is_json(path)):
        return Format.TEXT
    return Format.JSON


def is_text(head: bytes) -> bool:
    """Whether bytes, cut anywhere at their end, are UTF-8 without a NUL."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def read_all(path: Path) -> bytes:
    """All of a file, decompressed."""
    with opened(path) as (stream, _, _):
        return stream.read()


def lines_of(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file of JSON, without the mark that some editors put before the first."""
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
        return _zstandard  # the second: a frame to skip, with which parallel compressors begin
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
    """Whether the first line is a JSON object by itself, and there is another that begins as one.

    `sure`: the name says JSON, so that whatever follows the first is a further line.
    """
    with opened(path) as (stream, _, _):
        lines = (line.strip() for line in lines_of(stream))
        first = next(line for line in lines if line)
        second = next((line for line in lines if line), b"")
    return _parses(first) and (second.startswith(b"{") or (sure and second != b""))


def _is_json(path: Path) -> bool:
    return _parses(read_all(path).removeprefix(codecs.BOM_UTF8))


def _parses(data: bytes) -> bool:
    """Whether bytes are JSON, be it JSON that is refused for what it says."""
    try:
        json_value(data.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    except ValueError:
        return True
    return True
