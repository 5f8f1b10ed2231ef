"""Write a file in large blocks past the page cache, where the file system allows it.

Cached, each byte would be copied by the CPU once more, and all of them would go to disk at the final flush.
"""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np

PAGE = 4096  # bytes: alignment that O_DIRECT needs of addresses, lengths and offsets
_DIRECT = getattr(os, "O_DIRECT", 0)


def page_aligned(size: int) -> np.ndarray:
    """uint8 [size] that begins at a page."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


class DirectFile:
    """A new file, written at given offsets by several threads, each block durable when `finish` returns."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
            self._direct = bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a file system without O_DIRECT
                raise
            self._file, self._direct = os.open(path, flags, 0o666), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write(self, block: memoryview, at: int) -> None:
        """Write page-aligned memory, whole pages of it, at a multiple of the page size.

        On a disk that fills up, a partial write comes before the error.
        """
        done = 0
        while done < len(block):
            try:
                done += os.pwrite(self._file, block[done:], at + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._cache()
        if not self._direct:  # now, rather than all at once in the end: each block is a piece of progress
            os.fdatasync(self._file)

    def _cache(self) -> None:
        """Go through the page cache from now on: some file systems refuse O_DIRECT only here."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
        self._direct = False

    def finish(self, size: int) -> None:
        """Cut the file to its size, which need not be whole pages, and flush it to disk."""
        os.ftruncate(self._file, size)
        os.fsync(self._file)
