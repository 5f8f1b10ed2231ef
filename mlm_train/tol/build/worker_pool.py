"""The pool of a build's workers, on all nodes: starts them, gives them tasks, and replaces those that die."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from mlm_train.errors import UserError, first_line
from mlm_train.tol.build.ray_cluster import check_ray, check_resources
from mlm_train.tol.build.worker import BuildWorker, WorkerJob

POLL = 0.5  # seconds
PATIENCE = 30.0  # seconds that workers may take to start before a warning
ATTEMPTS = 4  # worker deaths after which a task fails the build
_STARTS = 4  # failed starts per worker, on average, after which the build fails


class WorkerDied(Exception):
    """A worker's process or node is gone."""


@dataclass
class PoolWorker:
    """A worker and its current task."""

    actor: Any
    group: tuple[int, ...] = ()  # the layers that it holds
    task: Any = None


class WorkerPool:
    """Keeps `size` workers: one that dies is replaced as soon as the cluster has resources.

    cpus, gpus: resources per worker. Raises UserError if no node has them.
    """

    def __init__(self, job: WorkerJob, size: int, cpus: int, gpus: float = 0.0) -> None:
        import ray

        self.job, self._needs = job, {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        fix = "add such a node, or give another --device" if gpus else "give fewer --threads"
        check_resources(self._needs, fix)
        # An abandoned actor must not restart: its partition is built again in another draft.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._class = ray.remote(**options)(BuildWorker)
        self._busy: dict[Any, PoolWorker] = {}
        self._starts_left = self._patience = _STARTS * size
        self.size, self.idle = size, list[PoolWorker]()
        self._warned = False
        for _ in range(size):
            self._start_worker()

    def _start_worker(self) -> None:
        worker = PoolWorker(self._class.remote(self.job))
        self._busy[worker.actor.ready.remote()] = worker
        self._last_start = time.monotonic()

    def submit(self, worker: PoolWorker, task: Any, method: str, *args: Any) -> None:
        """Run a method on an idle worker; `finished` returns its result with `task`."""
        self.idle.remove(worker)
        worker.task = task
        self._busy[getattr(worker.actor, method).remote(*args)] = worker

    def finished(self) -> list[tuple[Any, Any]]:
        """Wait up to POLL seconds; return ended tasks with their results, WorkerDied, or the error raised."""
        import ray
        from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError, RayTaskError

        ended = []
        ready, _ = ray.wait(list(self._busy), timeout=POLL)
        check_ray()
        self._warn_of_waiting()
        for reference in ready:
            worker = self._busy.pop(reference)
            task, worker.task = worker.task, None
            try:
                result = ray.get(reference)
            except ActorUnschedulableError as error:
                raise UserError(f"the Ray cluster cannot place a worker: {first_line(error)}") from None
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
        """Start a worker in place of one that died; UserError if too many have died at their start."""
        import ray

        ray.kill(worker.actor)  # it may be unreachable and still hold its resources
        self._starts_left -= starting
        if not self._starts_left:
            raise UserError(
                f"workers die as they start ({death}); give them more memory, "
                "and install mlm-train on every node"
            )
        self._start_worker()

    def _warn_of_waiting(self) -> None:
        """Warn once of workers that have not started: Ray itself waits silently, perhaps for ever."""
        import ray

        waiting = sum(worker.task is None for worker in self._busy.values())
        if self._warned or not waiting or time.monotonic() - self._last_start < PATIENCE:
            return
        self._warned = True
        free, total = ray.available_resources(), ray.cluster_resources()
        of_each = [f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in self._needs]
        print(
            f"{waiting} of {self.size} workers have not started: they wait for resources "
            f"(free in Ray: {', '.join(of_each)}) or for a slow disk",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def shutdown(self) -> None:
        """Kill all workers."""
        import ray

        for worker in (*self.idle, *self._busy.values()):
            ray.kill(worker.actor)
