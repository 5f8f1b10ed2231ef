"""The storage of a table: a folder, or a URL of any store that fsspec supports. Files have plain names.

Every file is first a draft: workers fill it, and only the builder gives it its final name. In a folder a
draft is a hidden file, created by the builder, filled by one or several workers, and renamed once it is
complete and flushed. At a URL (object_store.py) one worker writes it sequentially.
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

DRAFTS = ".*.part"  # glob of drafts


class StorageReader(Protocol):
    """Files by their plain names, as any process of a build sees them. Methods raise UserError or OSError.

    address: `reader_at` opens the same storage from it in any process of the build.
    """

    address: str

    def at(self, name: str) -> str:
        """The path or URL of a file, for messages."""

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """Stream a file from start to end, at most BLOCK_BYTES at a time."""

    def sink(self, draft: str, header: bytes = b"") -> Sink:
        """Open a draft for writing after its `header`, the one it was created with."""


class Storage(StorageReader, Protocol):
    """A storage as the one process uses it that holds its lock.

    in_order: files are written sequentially, each by one worker. remote: reading a file back takes as long
    as writing it.
    """

    in_order: bool
    remote: bool

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it does not exist."""

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file atomically: readers see the old or the new contents."""

    def names(self) -> list[str]:
        """The names of all files."""

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    def free(self) -> int | None:
        """Free space in bytes; None if unknown."""

    def draft(self, name: str, size: int, header: bytes = b"") -> str:
        """Create a draft of `size` bytes (0: unknown) for the file `name`; return the draft's name."""

    def name_draft(self, draft: str, name: str, size: int) -> None:
        """Give a complete draft of `size` bytes its final name."""

    def locked(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Lock out other processes, and raise an OSError of the block as a UserError.

        `doing`: what the holder of the lock does, for the UserError where another process has it.
        """

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Give workers access while the block runs; Ray must run."""


def put(sink: Sink, data: bytes) -> None:
    """Write all bytes of a draft at once and close it."""
    try:
        sink.append(np.frombuffer(data, np.uint8))
        sink.finish()
    finally:
        sink.close()


def remove_matching(storage: Storage, pattern: str) -> None:
    """Remove the files whose names match a glob."""
    for name in storage.names():
        if fnmatch(name, pattern):
            storage.remove(name)


def remove_drafts(storage: Storage) -> None:
    """Remove the drafts that killed processes left."""
    remove_matching(storage, DRAFTS)


def refuse_used(storage: Storage, note: str) -> None:
    """Raise a UserError if the storage holds any file.

    note: the file that is written first; its draft is all that a process killed at that moment can have left.
    """
    storage.remove(writing_name(note))
    if storage.names():
        raise UserError(
            f"{storage} exists already and nothing is overwritten; name a new folder, or remove it"
        )


def check_space(storage: Storage, needed: int) -> None:
    """Raise a UserError if the storage is known to have fewer than `needed` bytes free."""
    free = storage.free()
    if free is not None and free < needed:
        raise UserError(
            f"{storage} needs {in_units(needed)} and has {in_units(free)} free; "
            "free space or choose another folder"
        )


def writing_name(name: str) -> str:
    """The temporary name of a small file while it is written."""
    return draft_of(Path(name)).name


def draft_name(name: str) -> str:
    """A new name for a draft of a file: each attempt has its own, so that two cannot mix."""
    return f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part"
