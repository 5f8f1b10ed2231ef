"""Rows read from a table's files when they are needed, many at once, with the frequent ones in memory.

preadv releases the GIL, so threads keep as many reads in flight as a disk wants. A mapped file would read
page by page, one after the other, and fill the page cache with what is not needed again.
"""

import errno
import itertools
import mmap
import os
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.tol.format.index import INDEX, TolIndex
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.serve.parts import Parts, cut
from mlm_train.tol.serve.store import Counters, StoreOptions, Touch, copy_rows, split
from mlm_train.tol.serve.upload import stream_beside
from mlm_train.tol.storage.direct_io import BLOCK
from mlm_train.utils.files import listed
from mlm_train.utils.trace import span
from mlm_train.utils.units import in_units


class _Read(NamedTuple):
    """A part of a row's span: where it lies in a file."""

    part: int
    row: int
    file: int
    at: int
    bytes: int


class DiskStore:
    """Reads rows from the partitions' files; rows of `hot` ids, or those used last, stay in memory.

    span: the bytes [first, last) that are read of each row. device: where rows are needed; parts of them go
    there as soon as they are read.
    """

    def __init__(
        self,
        folder: Path,
        index: TolIndex,
        options: StoreOptions,
        span: tuple[int, int],
        device: torch.device | None = None,
    ) -> None:
        self.counters = Counters()
        shape = RowShape.of(index)
        self._row_bytes, self._size = index.row_bytes, span[1] - span[0]
        self._starts = [partition.rows[0] for partition in index.partitions]
        self._offsets = [
            len(shape.header(stop - start)) + span[0]
            for start, stop in (partition.rows for partition in index.partitions)
        ]
        self._touch = Touch(folder, index) if options.first_touch else None
        self._beside = None if device is None else stream_beside(device)
        paths = [listed(folder, partition.file, INDEX) for partition in index.partitions]
        self._files = _Files(paths, options.direct)
        self._readers = _Readers(options.depth, self._files)
        self._end = weakref.finalize(self, _end, self._readers, self._files)
        self._cache = _Cache.of(options, self._size, index.vocab_size)
        if self._cache is not None and options.hot is not None:
            if max(options.hot, default=0) >= index.vocab_size:
                raise UserError(
                    f"{folder} has {index.vocab_size} rows, and the frequent ids go to {max(options.hot)}: "
                    "give data of its tokenizer"
                )
            self._pin(self._cache, options.hot)
            self.counters = Counters()

    def fetch(self, ids: Tensor) -> "_Reading":
        """Start the reads of the rows that are not in memory."""
        parts = split(ids, self._starts)
        if self._touch is not None:
            self._touch(number for number, _ in parts)
        missing = torch.ones(len(ids), dtype=torch.bool)
        if self._cache is not None:
            missing = self._cache.lacks(ids)
        cuts = cut(int(missing.sum()), self._size)
        reading = _Reading(Parts(len(ids), cuts, self._beside), self.counters)
        if self._cache is not None:
            self._cache.copy(ids, ~missing, reading.parts)
        self.counters.distinct += len(ids)
        self._readers.start(reading, list(self._reads(parts, missing, cuts)))
        if self._cache is not None and missing.any():
            self._cache.admit_when_read(ids, missing, reading)
        return reading

    def close(self) -> None:
        """End the threads, then close the files; so does the end of the store's life."""
        self._end()

    def _reads(
        self, parts: Sequence[tuple[int, Sequence[int]]], missing: Tensor, cuts: Sequence[int]
    ) -> Iterator[_Read]:
        """All reads, in the order in which their bytes are needed."""
        wanted, places = missing.tolist(), []
        row = 0
        for file, local in parts:
            for number in local:
                if wanted[row]:
                    places.append((file, self._offsets[file] + number * self._row_bytes, row))
                row += 1
        self.counters.misses += len(places)
        self.counters.hits += row - len(places)
        self.counters.bytes += len(places) * self._size
        for part, (first, last) in enumerate(itertools.pairwise(cuts)):
            for file, start, row in places:
                yield _Read(part, row, file, start + first, last - first)

    def _pin(self, cache: "_Cache", hot: Sequence[int]) -> None:
        """Read the rows of the most frequent ids into the cache, in parts."""
        ids = torch.tensor(sorted(set(hot[: cache.room])), dtype=torch.int64)
        for some in ids.split(1024) if len(ids) else ():
            reading = self.fetch(some)
            reading.wait(0, self._size)
            cache.put(some, reading.parts.rows(torch.arange(len(some))))
        cache.fixed = True


def _end(readers: "_Readers", files: "_Files") -> None:
    readers.close()
    files.close()


class _Reading:
    """Spans of rows while they are read, complete part by part."""

    def __init__(self, parts: Parts, counters: Counters) -> None:
        self.parts = parts
        self.views = [block.numpy() for block in parts.blocks]
        self.error: Exception | None = None
        self._left = [0] * len(self.views)
        self._there = [threading.Event() for _ in self._left]
        self._lock, self._counters = threading.Lock(), counters

    def expect(self, reads: Sequence[_Read]) -> None:
        """Note how many reads complete each part."""
        for read in reads:
            self._left[read.part] += 1
        for part, left in enumerate(self._left):
            if not left:
                self._complete(part)

    def done(self, part: int) -> None:
        """One read of a part has ended."""
        with self._lock:
            self._left[part] -= 1
            last = not self._left[part]
        if last:
            self._complete(part)

    def failed(self, part: int, error: Exception) -> None:
        """One read of a part could not be done."""
        self.error = self.error or error
        self._there[part].set()

    def _complete(self, part: int) -> None:
        self.parts.filled(part)
        self._there[part].set()

    @property
    def complete(self) -> bool:
        """Whether all bytes are there."""
        return self.error is None and all(there.is_set() for there in self._there)

    def wait(self, first: int, last: int) -> None:
        """Wait for bytes [first, last) of all rows. UserError where they cannot be read."""
        started = time.perf_counter()
        for part in self.parts.of(first, last):
            self._there[part].wait()
        self._counters.wait += time.perf_counter() - started
        if self.error is not None:
            raise UserError(f"a row of the table could not be read: {self.error}") from self.error

    def columns(self, first: int, last: int) -> Tensor:
        """Wait for bytes [first, last) of all rows; see store.Rows."""
        self.wait(first, last)
        return self.parts.columns(first, last)


class _Files:
    """Open files, read at any offset, with O_DIRECT where asked for and possible."""

    def __init__(self, paths: Sequence[Path], direct: bool) -> None:
        self.paths, self._direct = paths, direct
        self._files = [os.open(path, os.O_RDONLY) for path in paths]
        self._unbuffered = [self._open_direct(path) if direct else None for path in paths]
        self._scratch = threading.local()

    @staticmethod
    def _open_direct(path: Path) -> int | None:
        try:
            return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:  # of a file system without it
            if error.errno != errno.EINVAL:
                raise
            return None

    def read(self, file: int, at: int, into: memoryview) -> None:
        """Read bytes from offset `at` until `into` is full. Raises OSError."""
        unbuffered = self._unbuffered[file]
        if unbuffered is None:
            self._fill(self._files[file], at, into, file)
            if self._direct:  # the page cache must be left alone all the same
                os.posix_fadvise(self._files[file], at, len(into), os.POSIX_FADV_DONTNEED)
            return
        first, last = at // BLOCK * BLOCK, -(-(at + len(into)) // BLOCK) * BLOCK
        if (first, last) == (at, at + len(into)):
            self._fill(unbuffered, at, into, file)
            return
        scratch = self._aligned(last - first)
        self._fill(unbuffered, first, scratch[: last - first], file, at + len(into) - first)
        into[:] = scratch[at - first : at - first + len(into)]

    def _fill(self, file: int, at: int, into: memoryview, number: int, least: int | None = None) -> None:
        done = 0
        while done < (len(into) if least is None else least):
            count = os.preadv(file, [into[done:]], at + done)
            if not count:
                raise OSError(f"{self.paths[number]} ends before byte {at + len(into)}")
            done += count

    def _aligned(self, size: int) -> memoryview:
        """Memory of this thread at a multiple of BLOCK."""
        held: mmap.mmap | None = getattr(self._scratch, "held", None)
        if held is None or len(held) < size:
            self._scratch.held = held = mmap.mmap(-1, size)
        return memoryview(held)

    def close(self) -> None:
        for file in (*self._files, *self._unbuffered):
            if file is not None:
                os.close(file)
        self._files, self._unbuffered = [], []


class _Readers:
    """Threads that share the reads of whatever reading comes next."""

    def __init__(self, depth: int, files: _Files) -> None:
        self._depth = depth
        self._queue: queue.SimpleQueue[tuple[_Reading, Iterator[_Read]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._queue, files), name="tol-read", daemon=True)
            for _ in range(depth)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, reading: _Reading, reads: list[_Read]) -> None:
        """Hand out the reads, in order."""
        reading.expect(reads)
        shared = iter(reads)  # a list's iterator gives each item to one thread
        for _ in range(min(self._depth, len(reads))):
            self._queue.put((reading, shared))

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


def _work(work: "queue.SimpleQueue[tuple[_Reading, Iterator[_Read]] | None]", files: _Files) -> None:
    while (item := work.get()) is not None:
        reading, reads = item
        for read in reads:
            try:
                with span("tol.read", read):
                    files.read(read.file, read.at, reading.views[read.part][read.row].data)
                reading.done(read.part)
            except Exception as error:  # shown to whoever waits for the row; this thread serves the next
                reading.failed(read.part, error)
        del item, reading, reads


class _Cache:
    """Rows in memory: fixed ones, or those used last."""

    def __init__(self, room: int, size: int, vocabulary: int) -> None:
        self.room, self.fixed = room, False
        self._rows = torch.empty(room, size, dtype=torch.uint8)
        self._slots = torch.full((vocabulary,), -1)
        self._order: OrderedDict[int, int] = OrderedDict()  # id -> slot, the one used last at the end
        self._pending: list[tuple[Tensor, Tensor, _Reading]] = []  # in the order in which they were asked for

    @classmethod
    def of(cls, options: StoreOptions, size: int, vocabulary: int) -> "_Cache | None":
        """A cache of at most options.cache_bytes; None if no row fits. UserError where memory is short."""
        room = min(options.cache_bytes // size, vocabulary)
        available = psutil.virtual_memory().available
        if room * size > available:
            raise UserError(
                f"a cache of {in_units(room * size)} does not fit in {in_units(available)} of free memory: "
                "give it less"
            )
        return cls(room, size, vocabulary) if room else None

    def lacks(self, ids: Tensor) -> Tensor:
        """Which ids [n] have no row here: bool [n]."""
        self._admit()
        return self._slots[ids] < 0

    def copy(self, ids: Tensor, here: Tensor, parts: Parts) -> None:
        """Copy the rows of those ids [n] that are `here` [n] to their places."""
        slots, places = self._slots[ids[here]].tolist(), here.nonzero().flatten().tolist()
        for block, (start, stop) in zip(parts.blocks, itertools.pairwise(parts.cuts), strict=True):
            copy_rows(self._rows[:, start:stop], slots, block, places)
        if not self.fixed:
            for number in ids[here].tolist():
                self._order.move_to_end(number)

    def admit_when_read(self, ids: Tensor, missing: Tensor, reading: _Reading) -> None:
        """Keep these rows when others are asked for and they are read."""
        if not self.fixed:
            self._pending.append((ids, missing, reading))

    def _admit(self) -> None:
        pending, self._pending = self._pending, []
        for ids, missing, reading in pending:
            if reading.complete:
                last = missing.nonzero().flatten()[-self.room :]
                self.put(ids[last], reading.parts.rows(last))
            elif reading.error is None:
                self._pending.append((ids, missing, reading))

    def put(self, ids: Tensor, rows: Tensor) -> None:
        """Store the rows of those ids that are not here; those unused for longest make room."""
        new = (self._slots[ids] < 0).nonzero().flatten()
        ids, slots = ids[new], []
        for number in ids.tolist():
            if len(self._order) < self.room:
                slot = len(self._order)
            else:
                oldest, slot = self._order.popitem(last=False)
                self._slots[oldest] = -1
            self._order[number] = slot
            slots.append(slot)
        copy_rows(rows, new.tolist(), self._rows, slots)
        self._slots[ids] = torch.tensor(slots, dtype=torch.int64)
