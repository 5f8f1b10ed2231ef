"""File I/O that bypasses the page cache.

A table may be larger than memory: cached, its pages evict the weights, and every further page must be freed
first. Written data also goes to disk at once instead of all of it at the final sync.
"""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # bytes: alignment that O_DIRECT needs of addresses and lengths; also the page size
_DONT_CACHE = 0x80  # RWF_DONTCACHE of Linux 6.14, for pwritev and preadv
_MIN_DIRECT = 2**20  # bytes of a direct write; smaller ones leave the disk idle
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL)  # from older kernels and some file systems


class UncachedFile:
    """An existing file, read or written at given offsets without the page cache. A context manager.

    `mode` O_WRONLY for writing: with read access NFS would read whole pages, and write stale bytes of other
    processes back with ours.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self._file = os.open(path, mode)
        self._flags = _DONT_CACHE
        self._direct: int | None = None  # the same file, opened with O_DIRECT for long writes
        if mode == os.O_WRONLY:
            try:
                self._direct = os.open(path, mode | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    os.close(self._file)
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file without syncing it."""
        os.close(self._file)
        self._close_direct()

    def write(self, data: np.ndarray, at: int, cached: bool = False) -> None:
        """Write `data` (uint8) at offset `at`; with `cached` through the page cache."""
        view = data.data
        while view:
            written = 0 if cached else self._write_direct(data, len(data) - len(view), at)
            written = written or self._call(os.pwritev, view, at, 0 if cached else self._flags)
            view, at = view[written:], at + written

    def _write_direct(self, data: np.ndarray, start: int, at: int) -> int:
        """Write the whole blocks of data[start:] with O_DIRECT; return the bytes written, 0 if impossible."""
        count = (len(data) - start) // BLOCK * BLOCK
        if self._direct is None or count < _MIN_DIRECT or (data.ctypes.data + start | at) % BLOCK:
            return 0
        try:
            return os.pwrite(self._direct, data.data[start : start + count], at)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        self._close_direct()
        return 0

    def _close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def read(self, view: memoryview, at: int) -> int:
        """Read into `view` from offset `at`; return the bytes read, 0 at the end of the file."""
        return self._call(os.preadv, view, at, self._flags)

    def _call(self, call: Callable[..., int], view: memoryview, at: int, flags: int) -> int:
        """Run preadv or pwritev with `flags`, and without them where the system does not support them."""
        try:
            return call(self._file, [view], at, flags)
        except OSError as error:
            if not flags or error.errno not in _UNSUPPORTED:
                raise
        self._flags = 0
        return call(self._file, [view], at)

    def sync(self) -> None:
        """Flush the file to disk."""
        os.fsync(self._file)


def buffers(rows: int, size: int, count: int = 2, pinned: bool = False) -> list[Tensor]:
    """Allocate `count` buffers uint8 [rows, size], aligned for O_DIRECT.

    pinned: in memory from which copies to an accelerator run beside its work.
    """
    storages = [torch.empty(rows * size + BLOCK, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
    starts = [-storage.data_ptr() % BLOCK for storage in storages]
    return [
        storage[at : at + rows * size].view(rows, size) for storage, at in zip(storages, starts, strict=True)
    ]


class Sink(Protocol):
    """A file that is written sequentially."""

    def append(self, data: np.ndarray) -> None:
        """Write the next bytes (uint8)."""

    def finish(self) -> None:
        """Make all written bytes durable."""

    def close(self) -> None:
        """Release the file; without `finish` before, its contents are undefined."""


class FileSink:
    """An existing file, written sequentially from offset `start`."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._file, self._at = UncachedFile(path, os.O_WRONLY), start

    def append(self, data: np.ndarray) -> None:
        """Write the next bytes (uint8)."""
        self._file.write(data, self._at)
        self._at += len(data)

    def finish(self) -> None:
        """Flush the file to disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Stream:
    """Hashes and writes rows in background threads while the next ones are computed. A context manager.

    `header`: the bytes before the rows, already in the sink. `buffers`: used in turn, one is filled while
    another is written.
    """

    def __init__(self, sink: Sink, header: bytes, buffers: Sequence[Tensor]) -> None:
        self.bytes = len(header)
        self._sink, self._digest = sink, hashlib.sha256(header)
        self._buffers: deque[tuple[Tensor, list[Future[None]]]] = deque((buffer, []) for buffer in buffers)
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in (self._writer, self._hasher):
            thread.shutdown(cancel_futures=True)
        self._sink.close()

    def rows(self, count: int) -> Tensor:
        """The buffer to fill with the next rows before `put`: uint8 [count, row bytes]."""
        buffer, pending = self._buffers[0]
        _wait(pending)
        return buffer[:count]

    def put(self, count: int) -> None:
        """Hash and write the buffer that `rows` returned, now filled."""
        buffer, _ = self._buffers.popleft()
        data = buffer[:count].numpy().reshape(-1)
        pending = [
            self._writer.submit(self._sink.append, data),
            self._hasher.submit(self._digest.update, data.data),
        ]
        self._buffers.append((buffer, pending))
        self.bytes += len(data)

    def finish(self) -> str:
        """Wait until all rows are written and durable; return the SHA-256 of header and rows."""
        for _, pending in self._buffers:
            _wait(pending)
        self._sink.finish()
        return self._digest.hexdigest()


def _wait(pending: list[Future[None]]) -> None:
    for future in pending:
        future.result()
