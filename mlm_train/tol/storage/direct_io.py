"""Files that a table's bytes go to and come from without staying in the system's page cache.

A table may be larger than memory: kept, its pages drive out the weights, and every further page has to be
made free first. What is written also goes to disk at once, not all of it when it is synced.
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

BLOCK = 4096  # bytes: what direct writing wants of addresses and lengths, and a page
_DONT_CACHE = 0x80  # RWF_DONTCACHE of Linux 6.14, for pwritev and preadv
_LEAST_DIRECT = 2**20  # bytes of a write: below, the disk waits for the program
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL)  # how an older system, or another file system, refuses


class UncachedFile:
    """A file that is there, read and written at given places. A context manager.

    Not opened for reading where it is written: NFS would then read whole pages, and write other processes'
    old bytes back with ours.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self._file = os.open(path, mode)
        self._flags = _DONT_CACHE
        self._direct: int | None = None  # the same file, for long writes that go by no cache at all
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
        """Without syncing."""
        os.close(self._file)
        self._end_direct()

    def write(self, data: np.ndarray, at: int, cached: bool = False) -> None:
        """The bytes of `data`, from `at` on; `cached`: as ordinary files are written."""
        view = data.data
        while view:
            written = 0 if cached else self._write_direct(data, len(data) - len(view), at)
            written = written or self._tried(os.pwritev, view, at, 0 if cached else self._flags)
            view, at = view[written:], at + written

    def _write_direct(self, data: np.ndarray, start: int, at: int) -> int:
        """Write whole blocks of data[start:]; how many bytes that were, 0 where it cannot be done."""
        count = (len(data) - start) // BLOCK * BLOCK
        if self._direct is None or count < _LEAST_DIRECT or (data.ctypes.data + start | at) % BLOCK:
            return 0
        try:
            return os.pwrite(self._direct, data.data[start : start + count], at)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        self._end_direct()
        return 0

    def _end_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def read(self, view: memoryview, at: int) -> int:
        """Fill `view` from there; how many bytes there were."""
        return self._tried(os.preadv, view, at, self._flags)

    def _tried(self, call: Callable[..., int], view: memoryview, at: int, flags: int) -> int:
        try:
            return call(self._file, [view], at, flags)
        except OSError as error:
            if not flags or error.errno not in _UNSUPPORTED:
                raise
        self._flags = 0
        return call(self._file, [view], at)

    def sync(self) -> None:
        """Have what was written here survive a power cut."""
        os.fsync(self._file)


def buffers(rows: int, size: int, count: int = 2) -> list[Tensor]:
    """Memory for rows that can be written directly, each uint8 [rows, size]."""
    room = [torch.empty(rows * size + BLOCK, dtype=torch.uint8) for _ in range(count)]
    starts = [-one.data_ptr() % BLOCK for one in room]
    return [one[at : at + rows * size].view(rows, size) for one, at in zip(room, starts, strict=True)]


class Sink(Protocol):
    """Takes a file's bytes from the first to the last."""

    def append(self, data: np.ndarray) -> None:
        """The next bytes."""

    def finish(self) -> None:
        """Have all of them survive a power cut."""

    def close(self) -> None:
        """Let go of it; what is not finished is worth nothing."""


class FileSink:
    """A file that is there, from `start` on."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._file, self._at = UncachedFile(path, os.O_WRONLY), start

    def append(self, data: np.ndarray) -> None:
        """The next bytes."""
        self._file.write(data, self._at)
        self._at += len(data)

    def finish(self) -> None:
        """Have all of them survive a power cut."""
        self._file.sync()

    def close(self) -> None:
        """Let go of it."""
        self._file.close()


class Stream:
    """Hashes and writes rows on threads, in their order, while the next ones are made. A context manager.

    `header`: the bytes before the rows, which the sink has already. `buffers`: two that take turns; one is
    filled while the other is written.
    """

    def __init__(self, sink: Sink, header: bytes, buffers: Sequence[Tensor]) -> None:
        self.bytes = len(header)
        self._sink, self._digest = sink, hashlib.sha256(header)
        self._buffers: deque[tuple[Tensor, list[Future[None]]]] = deque((one, []) for one in buffers)
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in (self._writer, self._hasher):
            thread.shutdown(cancel_futures=True)
        self._sink.close()

    def rows(self, count: int) -> Tensor:
        """Where the next rows are to be put, before `put`: uint8 [count, row bytes]."""
        buffer, work = self._buffers[0]
        _wait(work)
        return buffer[:count]

    def put(self, count: int) -> None:
        """What `rows` gave is filled."""
        buffer, _ = self._buffers.popleft()
        data = buffer[:count].numpy().reshape(-1)
        work = [
            self._writer.submit(self._sink.append, data),
            self._hasher.submit(self._digest.update, data.data),
        ]
        self._buffers.append((buffer, work))
        self.bytes += len(data)

    def finish(self) -> str:
        """Wait until all is written and synced; the SHA-256 of header and rows."""
        for _, work in self._buffers:
            _wait(work)
        self._sink.finish()
        return self._digest.hexdigest()


def _wait(work: list[Future[None]]) -> None:
    for one in work:
        one.result()
