"""An append-only file that survives a full disk.

A temporarily full disk must not end a run over a log line: what cannot be written waits in memory.
"""

import contextlib
import os
from pathlib import Path

from mlm_train.utils.files import append_regular


class Appended:
    """A file that grows by whole records; a record that could not be written is retried with the next one."""

    def __init__(self, path: Path) -> None:
        self.file = append_regular(path)
        self.waiting = bytearray()

    def add(self, record: bytes) -> None:
        """Write waiting records and this one; a partial write on a full disk is undone."""
        self.waiting += record
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
        """Try once more to write waiting records, then close."""
        self.add(b"")
        self.file.close()
