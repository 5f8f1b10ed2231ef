"""The store of a ToL's encoded rows while a model runs: one interface, three tiers.

A source asks for the rows of the distinct ids of a forward pass (`fetch`) and takes the columns of one layer
at a time, as late as it can; what must be read from a disk is read in between (disk.py).
"""

import itertools
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.tol.format.index import TolIndex
from mlm_train.tol.serve.parts import Parts, cut
from mlm_train.tol.serve.reader import check_rows
from mlm_train.tol.serve.upload import stream_beside
from mlm_train.utils.checks import Check
from mlm_train.utils.host_memory import will_need
from mlm_train.utils.units import in_units

Tier = Literal["resident", "shared", "disk"]
_Found = tuple[Tensor, Sequence[int]]  # a partition, and numbers of rows in it


@dataclass(frozen=True)
class StoreOptions:
    """Where the rows of a table are while it is served.

    tier: resident: in this process's memory, or on its device; shared: in mapped files, of which a node's
    processes share one copy; disk: read when they are needed. lock: (shared) read all files in and keep them
    in memory. cache_bytes: (disk) memory for frequent rows. hot: (disk) ids whose rows are read in at the
    start and stay, most frequent first, as many as the cache holds; None: the rows used last are kept.
    direct: (disk) reads leave the page cache alone. depth: (disk) reads in flight. first_touch: a partition's
    SHA-256 is compared when its first row is needed.
    """

    tier: Tier = "shared"
    lock: bool = False
    cache_bytes: int = 0
    hot: Sequence[int] | None = None
    direct: bool = False
    depth: int = 64
    verify: Check = "sizes"
    first_touch: bool = False

    def check(self) -> None:
        """Raise a UserError for options that do not go together."""
        if self.tier != "disk" and (self.cache_bytes or self.direct):
            raise UserError(f"tier {self.tier}: a cache and direct reads are for tier disk")
        if self.lock and self.tier != "shared":
            raise UserError(f"tier {self.tier}: only mapped files can be locked in memory: use tier shared")


@dataclass
class Counters:
    """Totals since the store was opened.

    rows: positions looked up; distinct: of those, distinct ids of a forward pass, and so hits + misses; hits:
    rows that were in the cache; bytes: of rows that were not; wait: seconds that layers waited for them.
    """

    rows: int = 0
    distinct: int = 0
    hits: int = 0
    misses: int = 0
    bytes: int = 0
    wait: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Of the distinct ids; 0 where there were none."""
        return self.hits / self.distinct if self.distinct else 0.0

    def __str__(self) -> str:
        return (
            f"ToL: {self.rows:,} rows, {self.distinct:,} distinct per pass, {self.hit_rate:.1%} of them "
            f"cached, {in_units(self.bytes)} of the others, {1e3 * self.wait:.1f} ms waited"
        )

    @property
    def totals(self) -> dict[str, float]:
        """The totals under Prometheus's names, without their suffix _total."""
        return {f"mlm_tol_{name}": value for name, value in self.by_name().items()}

    def prometheus(self) -> str:
        """The totals in Prometheus's text format, as mlm_tol_rows_total and so on."""
        return "".join(
            f"# TYPE {name}_total counter\n{name}_total {value}\n" for name, value in self.totals.items()
        )

    def by_name(self) -> dict[str, float]:
        """The totals with their units: rows, distinct, hits, misses, bytes, wait_seconds."""
        names = {"wait": "wait_seconds"}
        return {names.get(name, name): value for name, value in asdict(self).items()}

    def since(self, before: "Counters") -> "Counters":
        """What has been counted since these totals were had."""
        return Counters(**{name: value - getattr(before, name) for name, value in asdict(self).items()})


class Rows(Protocol):
    """The rows of some ids, read or still being read."""

    def columns(self, first: int, last: int) -> Tensor:
        """Bytes [first, last) of all rows' spans, uint8 [n, last - first], once they are there.

        Raises UserError where they cannot be read.
        """
        ...


class RowStore(Protocol):
    """Encoded rows by id, or of each row the one span of bytes that is needed."""

    counters: Counters

    def fetch(self, ids: Tensor) -> Rows:
        """Begin to read the rows of ascending distinct ids [n], int64 on the CPU."""
        ...

    def close(self) -> None:
        """Release files, threads and memory."""
        ...


class MemoryStore:
    """Partitions as tensors uint8 [rows, bytes of a row's span]: mapped files, memory, or a device's.

    device: where rows are needed, if it is another one; parts of them go there once they are gathered.
    """

    def __init__(
        self,
        partitions: Sequence[Tensor],
        starts: Sequence[int],
        mapped: bool = False,
        touch: "Touch | None" = None,
        device: torch.device | None = None,
    ) -> None:
        self.counters, self._mapped = Counters(), mapped
        self._beside = None if device is None else stream_beside(device)
        self._partitions, self._starts, self._touch = partitions, starts, touch

    def fetch(self, ids: Tensor) -> Rows:
        """Begin to read the rows in, where they are mapped; the first `columns` copies them."""
        parts = split(ids, self._starts)
        if self._touch is not None:
            self._touch(number for number, _ in parts)
        self.counters.distinct += len(ids)
        self.counters.misses += len(ids)
        whole = self._partitions[0].shape[1]
        self.counters.bytes += len(ids) * whole
        found = [(self._partitions[number], local) for number, local in parts]
        # All at once: touched one after the other, each would wait for the disk.
        for rows, local in found if self._mapped else ():
            for number in local:
                will_need(rows.data_ptr() + number * rows.stride(0), rows.shape[1])
        if self._beside is not None:
            return _Sent(found, Parts(len(ids), cut(len(ids), whole), self._beside), self.counters)
        return _Gathered(found, len(ids), self.counters)

    def close(self) -> None:
        """Release the memory."""
        self._partitions = ()


class _Gathered:
    """Rows copied beside each other, on the device where they are; one alone is used where it lies."""

    def __init__(self, found: Sequence[_Found], count: int, counters: Counters) -> None:
        self._found, self._count, self._counters = found, count, counters
        self._indices: list[Tensor] = []
        if count > 1 and found[0][0].device.type != "cpu":
            # To the device here, where the ids were waited for, and not when a layer asks.
            self._indices = [torch.tensor(local, device=rows.device) for rows, local in found]

    @cached_property
    def _rows(self) -> Tensor:
        rows, local = self._found[0]
        if self._count == 1:
            return rows[local[0] : local[0] + 1]
        started, done = time.perf_counter(), 0
        gathered = rows.new_empty(self._count, rows.shape[1])
        for number, (rows, local) in enumerate(self._found):
            some = gathered[done : done + len(local)]
            if self._indices:
                torch.index_select(rows, 0, self._indices[number], out=some)
            else:
                copy_rows(rows, local, some, range(len(local)))
            done += len(local)
        self._counters.wait += time.perf_counter() - started
        return gathered

    def columns(self, first: int, last: int) -> Tensor:
        return self._rows[:, first:last]


class _Sent:
    """Rows that go to an accelerator: a part is gathered and sent when the first layer asks for it."""

    def __init__(self, found: Sequence[_Found], parts: Parts, counters: Counters) -> None:
        self._found, self._parts, self._counters = found, parts, counters
        self._sent = set[int]()

    def columns(self, first: int, last: int) -> Tensor:
        started = time.perf_counter()
        for part in self._parts.of(first, last):
            if part not in self._sent:
                self._sent.add(part)
                self._send(part)
        self._counters.wait += time.perf_counter() - started
        return self._parts.columns(first, last)

    def _send(self, part: int) -> None:
        done, (start, stop) = 0, self._parts.cuts[part : part + 2]
        for rows, local in self._found:
            places = range(done, done + len(local))
            copy_rows(rows[:, start:stop], local, self._parts.blocks[part], places)
            done += len(local)
        self._parts.filled(part)


def copy_rows(rows: Tensor, numbers: Sequence[int], into: Tensor, places: Sequence[int]) -> None:
    """into[places] = rows[numbers], a row at a time: on a CPU, indexing would copy byte by byte."""
    for number, place in zip(numbers, places, strict=True):
        into[place].copy_(rows[number])


def split(ids: Tensor, starts: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Ascending ids [n] by partition: its number, and their row numbers within it, in order."""
    numbers = ids.tolist()
    edges = [*(bisect_left(numbers, start) for start in starts), len(numbers)]
    return [
        (number, [row - starts[number] for row in numbers[first:last]])
        for number, (first, last) in enumerate(itertools.pairwise(edges))
        if first < last
    ]


class Touch:
    """Compares a partition's SHA-256 with the index's the first time that it is used."""

    def __init__(self, folder: Path, index: TolIndex) -> None:
        self._folder, self._index = folder, index
        self._checked: set[int] = set()

    def __call__(self, numbers: Iterable[int]) -> None:
        """Raises UserError for a damaged partition, each time it is asked for."""
        for number in numbers:
            if number not in self._checked:
                check_rows(self._folder, [self._index.partitions[number].rows], 1)
                self._checked.add(number)
