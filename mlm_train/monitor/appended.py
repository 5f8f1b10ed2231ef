"""A file that a full disk does not break.

A disk that is full for a while must not end a run over a log line: what it does not take waits in memory.
"""

import contextlib
import os
from pathlib import Path

from mlm_train.utils.files import append_regular


class Appended:
    """A file that grows by whole pieces; what could not be written goes with the next one."""

    def __init__(self, path: Path) -> None:
        self.file = append_regular(path)
        self.waiting = bytearray()

    def add(self, piece: bytes) -> None:
        """Write it, after what waits; a part that a full disk took is taken back."""
        self.waiting += piece
        end = os.fstat(self.file.fileno()).st_size
        try:
            block = memoryview(bytes(self.waiting))
            while block:
                block = block[self.file.write(block) :]
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(end)
        else:
            self.waiting.clear()

    def close(self) -> None:
        """A last try, and the end."""
        self.add(b"")
        self.file.close()
