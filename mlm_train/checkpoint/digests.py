"""SHA-256 of a checkpoint's files, by blocks, so that threads and ranks share even a single huge file.

The digest of a file in blocks is that of its blocks' digests, one after the other.
"""

import hashlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import local
from typing import NamedTuple

from mlm_train.errors import UserError
from mlm_train.utils.files import hashing, open_regular, read_at
from mlm_train.utils.records import Count, FileRecord
from mlm_train.utils.threads import in_threads

BLOCK = 2**24  # bytes of a block in new checkpoints
THREADS = 16  # that hash: most of them wait for the disk, which is faster where many do
PIECE = 2**20  # bytes read or copied, and hashed at once: they stay in a core's cache
_buffer = local()


class ShardRecord(FileRecord):
    """A file of a checkpoint. block: bytes of the blocks that its SHA-256 is made of; 0: it is the bytes'."""

    block: Count = 0


def block_of(entry: FileRecord) -> int:
    """Bytes of the blocks that a file's SHA-256 is made of; 0: it has none."""
    return entry.block if isinstance(entry, ShardRecord) else 0


class Unit(NamedTuple):
    """Bytes that are hashed together: a block of a file, or all of it."""

    file: int  # its number
    begin: int
    size: int


def units(files: Sequence[FileRecord]) -> list[Unit]:
    """The units of files, in order."""
    found = []
    for number, entry in enumerate(files):
        size = max(entry.bytes, 1)  # an empty file is a unit too
        step = block_of(entry) or size
        found += [Unit(number, begin, min(step, entry.bytes - begin)) for begin in range(0, size, step)]
    return found


class Streamed:
    """The digest of a file that arrives from start to end."""

    def __init__(self, entry: FileRecord) -> None:
        self.block, self.count, self.done = block_of(entry), 0, list[bytes]()
        self.digest = hashlib.sha256()

    def update(self, data: bytes) -> None:
        """The next bytes."""
        view = memoryview(data)
        while view:
            rest = self.block - self.count % self.block if self.block else len(view)
            self.digest.update(view[:rest])
            self.count += len(view[:rest])
            view = view[rest:]
            if self.block and self.count % self.block == 0:
                self._end_block()

    def _end_block(self) -> None:
        self.done.append(self.digest.digest())
        self.digest = hashlib.sha256()

    def hexdigest(self) -> str:
        """Of all bytes so far."""
        if not self.block:
            return self.digest.hexdigest()
        if self.count % self.block or not self.count:
            self._end_block()
        return joined(self.done)


def joined(digests: Iterable[bytes]) -> str:
    """The digest, in hexadecimal, of a file whose blocks have these."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def hashed(
    folder: Path, files: Sequence[FileRecord], wanted: Iterable[Unit]
) -> Generator[None, None, dict[Unit, bytes]]:
    """The digests of units, which are in order; each file is opened once. Yields after each piece of work.

    Raises UserError where a file cannot be read: it may be whole.
    """
    found: dict[Unit, bytes] = {}
    for number, group in groupby(wanted, lambda unit: unit.file):
        entry = files[number]
        path = folder / entry.file
        try:
            if not block_of(entry):
                found[next(group)] = bytes.fromhex((yield from hashing(path)))
                continue
            with open_regular(path) as file:
                blocks = list(group)
                results = in_threads(partial(_hashed_block, file.fileno()), blocks, THREADS)
                for unit, digest in zip(blocks, results, strict=True):
                    found[unit] = digest
                    yield
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return found


def _hashed_block(descriptor: int, unit: Unit) -> bytes:
    digest, end = hashlib.sha256(), unit.begin + unit.size
    if not hasattr(_buffer, "piece"):
        _buffer.piece = memoryview(bytearray(PIECE))
    for begin in range(unit.begin, end, PIECE):
        count = read_at(descriptor, _buffer.piece[: end - begin], begin)
        digest.update(_buffer.piece[:count])
    return digest.digest()


def first_fault(folder: Path, files: Sequence[FileRecord], found: Mapping[Unit, bytes]) -> str | None:
    """What is wrong with the content of the first damaged file, naming it; None: nothing.

    found: the digests of all units.
    """
    for number, group in groupby(units(files), lambda unit: unit.file):
        entry, digests = files[number], [found[unit] for unit in group]
        if entry.sha256 != (joined(digests) if block_of(entry) else digests[0].hex()):
            return f"{folder / entry.file} is damaged: its checksum differs"
    return None
