"""Which pieces of a build are to be done next: partitions, each filled group of layers by group of layers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlm_train.errors import UserError
from mlm_train.tol.build.state import BuildPlan
from mlm_train.tol.build.worker import FilledRows, Sums
from mlm_train.tol.build.worker_pool import ATTEMPTS, WorkerDied
from mlm_train.tol.format.index import Partition
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.storage.base import Storage

Group = tuple[int, ...]


@dataclass(frozen=True)
class PartitionTask:
    """One task. layers: those to write into the draft; None: the draft was filled and is to be hashed."""

    number: int
    draft: str
    layers: Group | None


@dataclass
class _Open:
    """A partition that is being made. An attempt writes a draft of its own: two can never mix."""

    draft: str
    waiting: list[Group]
    running: int = 0
    sums: dict[Group, Sums] = field(default_factory=dict)


class PartitionScheduler:
    """The order: a group that the worker holds already, of the earliest partition. Large ones come first: no
    worker is left with one at the end.

    Drafts are begun, named and removed here: workers only fill them, so that one that lives on after its
    builder, or was given up, changes no file of a folder that counts (at a URL: storage/object_store.py).
    """

    def __init__(
        self,
        storage: Storage,
        plan: BuildPlan,
        shape: RowShape,
        missing: Sequence[int],
        groups: Sequence[Group],
    ) -> None:
        self.storage, self.plan, self.shape, self.groups = storage, plan, shape, list(groups)
        self._closed = sorted(missing, key=lambda number: (self._rows(number), -number))
        self._open: dict[int, _Open] = {}
        self._deaths: Counter[int] = Counter()

    def next(self, held: Group) -> PartitionTask | None:
        """A piece for a worker that holds these layers; None where nothing is left to begin.

        A partition is committed early, and a worker seldom changes its layers: a few may be open at a time.
        """
        for number, one in self._open.items():
            if not one.waiting and not one.running:
                one.running += 1
                return self._piece(number, None)
        for number, one in self._open.items():
            if held in one.waiting:
                return self._begin(number, held)
        waiting = [number for number, one in self._open.items() if one.waiting]
        if self._closed and len(waiting) < 2 * len(self.groups):
            number = self._closed.pop()
            self._open[number] = self._attempt(number)
            # Workers that hold nothing of use begin with different groups.
            spread = self.groups[len(waiting) % len(self.groups)]
            return self._begin(number, held if held in self.groups else spread)
        if waiting:
            return self._begin(waiting[0], self._open[waiting[0]].waiting[0])
        return None

    def _begin(self, number: int, group: Group) -> PartitionTask:
        one = self._open[number]
        one.waiting.remove(group)
        one.running += 1
        return self._piece(number, group)

    def _piece(self, number: int, layers: Group | None) -> PartitionTask:
        return PartitionTask(number, self._open[number].draft, layers)

    def _rows(self, number: int) -> int:
        start, stop = self.plan.rows(number)
        return stop - start

    def _attempt(self, number: int) -> _Open:
        rows = self._rows(number)
        draft = self.storage.draft(
            self.plan.file(number), self.shape.file_bytes(rows), self.shape.header(rows)
        )
        return _Open(draft, list(self.groups))

    def ended(
        self, task: PartitionTask, result: FilledRows | Partition | Exception
    ) -> tuple[Partition, Sums] | None:
        """Take a piece's result; the partition and the sums of all its layers, once it has its name.

        A worker's death throws the partition's draft away, since what it has written is not known. Any
        other error is raised, unless it is about a draft that was thrown away.
        """
        one = self._open.get(task.number)
        if one is None or one.draft != task.draft:
            return None  # of an attempt that was given up
        one.running -= 1
        if isinstance(result, WorkerDied):
            self._again(task.number, one, result)
        elif isinstance(result, Exception):
            raise result
        elif isinstance(result, Partition):
            return self._name(task, one, result)
        else:
            assert task.layers is not None
            one.sums[task.layers] = result.sums
            if result.partition is not None:
                return self._name(task, one, result.partition)
        return None

    def _name(self, task: PartitionTask, one: _Open, partition: Partition) -> tuple[Partition, Sums]:
        self.storage.name_draft(task.draft, partition.file, partition.bytes)
        del self._open[task.number]
        return partition, [pair for group in self.groups for pair in one.sums[group]]

    def _again(self, number: int, one: _Open, death: WorkerDied) -> None:
        self._deaths[number] += 1
        if self._deaths[number] == ATTEMPTS:
            raise UserError(
                f"a worker died {ATTEMPTS} times ({death}); give it memory or fewer --workers "
                "and run again: finished partitions are kept"
            )
        self.storage.remove(one.draft)
        del self._open[number]
        self._closed.insert(0, number)  # after all others: it may be what kills them

    def written(self, row_bytes: dict[Group, int]) -> int:
        """Bytes of the groups that open partitions hold already."""
        total = 0
        for number, one in self._open.items():
            total += sum(row_bytes[group] for group in one.sums) * self._rows(number)
        return total
