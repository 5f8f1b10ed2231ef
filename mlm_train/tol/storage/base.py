"""Where a table goes: a folder, or a URL of any store that fsspec knows. Plain names of files in either.

A file comes into being as a draft, which workers fill, and the builder alone gives it its name. In a folder a
draft is a hidden file, made by the builder, filled by one worker or several, and renamed once it is whole and
flushed. At a URL (object_store.py) it is written from its first byte to its last, by one worker.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

import numpy as np

from mlm_train.errors import UserError
from mlm_train.tol.storage.direct_io import Sink
from mlm_train.utils.files import draft_of
from mlm_train.utils.units import in_units

DRAFTS = ".*.part"  # glob of files that do not have their name yet
BLOCK_BYTES = 8 * 2**20  # of one read, or one write, of a file that is read or written in order


class StorageReader(Protocol):
    """Files by their plain names, as any process sees them. Methods raise UserError or OSError.

    address: what `files_at` makes the same of, in any process.
    """

    address: str

    def at(self, name: str) -> str:
        """Where a file is, for messages."""

    def read(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file from start to end, BLOCK_BYTES at most at a time."""

    def sink(self, draft: str, header: bytes = b"") -> Sink:
        """Fill a draft, from behind `header` on, with which it was begun."""


class Storage(StorageReader, Protocol):
    """And what the one process does that holds the place. `held` turns an OSError into a UserError.

    in_order: a file is written from its first byte to its last, by one worker. far: reading one back takes as
    long as it took to write.
    """

    in_order: bool
    far: bool

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file at once: readers see the old one or the new one, whole."""

    def names(self) -> list[str]:
        """All that lies there."""

    def remove(self, name: str) -> None:
        """Remove a file that may be gone already."""

    def free(self) -> int | None:
        """Bytes of space; None where that is not known."""

    def draft(self, name: str, size: int, header: bytes = b"") -> str:
        """Begin a file of that size, or of an unknown one (0); what its draft is called."""

    def name_draft(self, draft: str, name: str, size: int) -> None:
        """Give a whole draft, of `size` bytes, its name."""

    def held(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from changing the place; UserError where one does (`doing`, of that one)."""

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Let workers have it, once Ray runs."""


def put(sink: Sink, data: bytes) -> None:
    """Fill a draft with all of its bytes at once."""
    try:
        sink.append(np.frombuffer(data, np.uint8))
        sink.finish()
    finally:
        sink.close()


def remove_matching(storage: Storage, pattern: str) -> None:
    """Remove the files of such names (a glob)."""
    for name in storage.names():
        if fnmatch(name, pattern):
            storage.remove(name)


def remove_drafts(storage: Storage) -> None:
    """Remove what killed processes left half written."""
    remove_matching(storage, DRAFTS)


def refuse_used(storage: Storage, note: str) -> None:
    """UserError where something lies there: nothing is overwritten.

    note: the file that is written there first; a process that was killed meanwhile left nothing else.
    """
    storage.remove(writing_name(note))
    if storage.names():
        raise UserError(
            f"{storage} exists already and nothing is overwritten; name a new folder, or remove it"
        )


def check_space(storage: Storage, needed: int) -> None:
    """UserError where a place is known to have fewer bytes free."""
    free = storage.free()
    if free is not None and free < needed:
        raise UserError(
            f"{storage} needs {in_units(needed)} and has {in_units(free)} free; "
            "free space or choose another folder"
        )


def writing_name(name: str) -> str:
    """What a small file is called before it takes its name."""
    return draft_of(Path(name)).name


def draft_name(name: str) -> str:
    """What a draft of a file is called: an attempt has its own, so that two cannot mix."""
    return f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part"
