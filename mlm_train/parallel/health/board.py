"""What the ranks of a node tell each other: messages in a piece of memory that they share.

It has no server, which could be stopped, and no name in a folder: it goes with the last process that uses it.
"""

import contextlib
import fcntl
import json
import os
import secrets
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator

from mlm_train.parallel.health.status_store import Message, StatusStore

SLOT = 16384  # bytes of a message, header included
HEADER = struct.Struct("<II")  # length and CRC-32 of the text: a message may be read while it is written
ATTEMPTS = 5


class Board:
    """A message in each of some slots. Any process of the node may read one; one at a time writes it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.latest: dict[int, Message] = {}

    @classmethod
    def private(cls) -> "Board":
        """A board of this process alone."""
        return cls(_memory(""))

    @classmethod
    def shared(cls, store: StatusStore, key: str) -> "Board | None":
        """The board of the node's ranks, made by the first of them to come; the store tells the others.

        None where this process cannot reach the memory of that rank: in another container, or not on Linux.
        """
        name = f"mlm-train-{secrets.token_hex(8)}"
        own = _memory(name)
        offer = {"process": os.getpid(), "descriptor": own, "name": name}
        first = store.claim(key, offer)
        if first == offer:
            return cls(own)
        os.close(own)
        path = f"/proc/{first['process']}/fd/{first['descriptor']}"
        try:
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC)) if _is(path, first["name"]) else None
        except OSError:
            return None

    def write(self, slot: int, message: Message) -> None:
        """Put a message into a slot. It may have up to SLOT bytes of JSON."""
        text = json.dumps(message).encode()
        os.pwrite(self.descriptor, HEADER.pack(len(text), zlib.crc32(text)) + text, slot * SLOT)

    def read(self, slot: int) -> Message | None:
        """The message in a slot; None where there is none yet."""
        for _ in range(ATTEMPTS):
            found = os.pread(self.descriptor, SLOT, slot * SLOT)
            length, checksum = HEADER.unpack_from(found) if len(found) >= HEADER.size else (0, 0)
            text = found[HEADER.size : HEADER.size + length]
            if not length:
                break
            if zlib.crc32(text) == checksum:
                self.latest[slot] = json.loads(text)
                break
        return self.latest.get(slot)

    @contextlib.contextmanager
    def locked(self, seconds: float) -> Iterator[None]:
        """Keep other ranks of the node out of the body; after so many seconds enter it all the same."""
        end, held = time.monotonic() + seconds, False
        while not held and time.monotonic() < end:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError:
                time.sleep(0.02)
        try:
            yield
        finally:
            if held:
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)


def _memory(name: str) -> int:
    """The descriptor of memory that other processes can open, or of a file where there is no such thing."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _is(path: str, name: str) -> bool:
    """Whether this is the memory of that name: a process of the same number may lie in another container."""
    return os.path.islink(path) and os.readlink(path) == f"/memfd:{name} (deleted)"
