"""The workers of a build, on as many nodes as there are: who is idle, who has died, what they were doing."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from mlm_train.errors import UserError, first_line
from mlm_train.tol.build.ray_cluster import check_ray, check_room
from mlm_train.tol.build.worker import BuildWorker, WorkerJob

POLL = 0.5  # seconds
PATIENCE = 30.0  # seconds that workers may take to start before it is said
ATTEMPTS = 4  # workers that may die over one task
_STARTS = 4  # of each worker, on the average, after which one must have come up


class WorkerDied(Exception):
    """Its process, or its node, is gone."""


@dataclass
class PoolWorker:
    """A worker, and what it is doing."""

    actor: Any
    group: tuple[int, ...] = ()  # the layers that it holds
    task: Any = None


class WorkerPool:
    """Keeps `size` workers: one that dies is replaced, where the cluster has room for another.

    cpus, gpus: what each takes of the cluster. Raises UserError where no node has that.
    """

    def __init__(self, job: WorkerJob, size: int, cpus: int, gpus: float = 0.0) -> None:
        import ray

        self.job, self._needs = job, {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        fix = "give such a node, or another --device" if gpus else "give fewer --threads"
        check_room(self._needs, fix)
        # An actor that is given up must not come back: its partition is made anew, under another name.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._class = ray.remote(**options)(BuildWorker)
        self._busy: dict[Any, PoolWorker] = {}
        self._starts_left = self._patience = _STARTS * size
        self.size, self.idle = size, list[PoolWorker]()
        self._told = False
        for _ in range(size):
            self._hire()

    def _hire(self) -> None:
        worker = PoolWorker(self._class.remote(self.job))
        self._busy[worker.actor.ready.remote()] = worker
        self._hired = time.monotonic()

    def do(self, worker: PoolWorker, task: Any, method: str, *args: Any) -> None:
        """Have an idle member do something; `finished` says when, with `task`."""
        self.idle.remove(worker)
        worker.task = task
        self._busy[getattr(worker.actor, method).remote(*args)] = worker

    def finished(self) -> list[tuple[Any, Any]]:
        """What has ended within POLL seconds: tasks, and their results; WorkerDied, or what a task raised."""
        import ray
        from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError, RayTaskError

        ended = []
        ready, _ = ray.wait(list(self._busy), timeout=POLL)
        check_ray()
        self._tell_who_waits()
        for reference in ready:
            worker = self._busy.pop(reference)
            task, worker.task = worker.task, None
            try:
                result = ray.get(reference)
            except ActorUnschedulableError as error:
                raise UserError(f"the Ray cluster has no place for a worker: {first_line(error)}") from None
            except (RayActorError, OutOfMemoryError) as error:
                result = WorkerDied(first_line(error))
                self._replace(worker, task is None, result)
            except RayTaskError as error:
                result = error.cause if isinstance(error.cause, UserError | OSError) else error
                self.idle.append(worker)
            else:
                self._starts_left = self._patience
                self.idle.append(worker)
            if task is not None:
                ended.append((task, result))
        return ended

    def _replace(self, worker: PoolWorker, starting: bool, death: WorkerDied) -> None:
        """Take another for one that died; UserError where none comes up any more."""
        import ray

        ray.kill(worker.actor)  # it may be out of reach, and still hold its place
        self._starts_left -= starting
        if not self._starts_left:
            raise UserError(
                f"workers die as they start ({death}); give them memory, and every node this program"
            )
        self._hire()

    def _tell_who_waits(self) -> None:
        """Once: Ray itself waits without a word for a place that may never be free. Others work meanwhile."""
        import ray

        waiting = sum(worker.task is None for worker in self._busy.values())
        if self._told or not waiting or time.monotonic() - self._hired < PATIENCE:
            return
        self._told = True
        free, all_of_them = ray.available_resources(), ray.cluster_resources()
        of_each = [f"{free.get(kind, 0):g} of {all_of_them.get(kind, 0):g} {kind}s" for kind in self._needs]
        print(
            f"{waiting} of {self.size} workers have not started: they wait for a place "
            f"(free in Ray: {', '.join(of_each)}), or for a slow disk",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def dismiss(self) -> None:
        """End all workers at once."""
        import ray

        for worker in (*self.idle, *self._busy.values()):
            ray.kill(worker.actor)
