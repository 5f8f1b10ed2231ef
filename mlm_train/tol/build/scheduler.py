"""The order of a build's tasks: partitions, each filled one group of layers at a time."""

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
    """A task of a partition. layers: to write into its draft; None: the draft is full and must be hashed."""

    number: int
    draft: str
    layers: Group | None


@dataclass
class _OpenPartition:
    """A partition that is being filled. Each attempt has its own draft, so that two cannot mix."""

    draft: str
    waiting: list[Group]
    running: int = 0
    sums: dict[Group, Sums] = field(default_factory=dict)


class PartitionScheduler:
    """Chooses tasks: preferably the group that the worker already holds, of the earliest open partition.

    Large partitions come first, so that no worker is left with one at the end. Drafts are created, named and
    removed here and only filled by workers, so that an abandoned worker, or one that outlives its builder,
    changes no committed file of a folder (at a URL: storage/object_store.py).
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
        self._open: dict[int, _OpenPartition] = {}
        self._deaths: Counter[int] = Counter()

    def next(self, held: Group) -> PartitionTask | None:
        """The next task for a worker that holds these layers; None if none is left to start.

        A few partitions are open at a time: they are committed early, and workers rarely change their layers.
        """
        for number, partition in self._open.items():
            if not partition.waiting and not partition.running:
                partition.running += 1
                return PartitionTask(number, partition.draft, None)
        for number, partition in self._open.items():
            if held in partition.waiting:
                return self._start(number, held)
        waiting = [number for number, partition in self._open.items() if partition.waiting]
        if self._closed and len(waiting) < 2 * len(self.groups):
            number = self._closed.pop()
            self._open[number] = self._attempt(number)
            # Workers that hold none of these groups start with different ones.
            spread = self.groups[len(waiting) % len(self.groups)]
            return self._start(number, held if held in self.groups else spread)
        if waiting:
            return self._start(waiting[0], self._open[waiting[0]].waiting[0])
        return None

    def _start(self, number: int, group: Group) -> PartitionTask:
        partition = self._open[number]
        partition.waiting.remove(group)
        partition.running += 1
        return PartitionTask(number, partition.draft, group)

    def _rows(self, number: int) -> int:
        start, stop = self.plan.rows(number)
        return stop - start

    def _attempt(self, number: int) -> _OpenPartition:
        rows = self._rows(number)
        draft = self.storage.draft(
            self.plan.file(number), self.shape.file_bytes(rows), self.shape.header(rows)
        )
        return _OpenPartition(draft, list(self.groups))

    def on_result(
        self, task: PartitionTask, result: FilledRows | Partition | Exception
    ) -> tuple[Partition, Sums] | None:
        """Process a task's result; returns the partition and the sums of all its layers once it is complete.

        If a worker died, the partition's draft is discarded, since its contents are unknown. Any other error
        is raised, unless it is about a discarded draft.
        """
        opened = self._open.get(task.number)
        if opened is None or opened.draft != task.draft:
            return None  # of an abandoned attempt
        opened.running -= 1
        if isinstance(result, WorkerDied):
            self._retry(task.number, opened, result)
        elif isinstance(result, Exception):
            raise result
        elif isinstance(result, Partition):
            return self._name(task, opened, result)
        else:
            assert task.layers is not None
            opened.sums[task.layers] = result.sums
            if result.partition is not None:
                return self._name(task, opened, result.partition)
        return None

    def _name(
        self, task: PartitionTask, opened: _OpenPartition, partition: Partition
    ) -> tuple[Partition, Sums]:
        self.storage.name_draft(task.draft, partition.file, partition.bytes)
        del self._open[task.number]
        return partition, [pair for group in self.groups for pair in opened.sums[group]]

    def _retry(self, number: int, opened: _OpenPartition, death: WorkerDied) -> None:
        self._deaths[number] += 1
        if self._deaths[number] == ATTEMPTS:
            raise UserError(
                f"a worker died {ATTEMPTS} times ({death}); give it more memory or fewer --workers "
                "and run again: finished partitions are kept"
            )
        self.storage.remove(opened.draft)
        del self._open[number]
        self._closed.insert(0, number)  # to be started last: it may be what kills workers

    def written(self, row_bytes: dict[Group, int]) -> int:
        """Bytes that open partitions hold already; row_bytes: of each group."""
        total = 0
        for number, partition in self._open.items():
            total += sum(row_bytes[group] for group in partition.sums) * self._rows(number)
        return total
