"""The workers of a build, on as many nodes as there are: who is idle, who has died, what they were doing."""

from dataclasses import dataclass
from typing import Any

from mlm_train.errors import UserError
from mlm_train.tol.cluster import check_ray
from mlm_train.tol.worker import Job, Worker

POLL = 0.5  # seconds
ATTEMPTS = 4  # workers that may die over one task
_STARTS = 4  # of each worker, on the average, after which one must have come up


class WorkerDied(Exception):
    """Its process, or its node, is gone."""


@dataclass
class Member:
    """A worker, and what it is doing."""

    actor: Any
    group: tuple[int, ...] = ()  # the layers that it holds
    task: Any = None


class Crew:
    """Keeps `size` workers: one that dies is replaced, where the cluster has room for another.

    cpus, gpus: what each takes of the cluster.
    """

    def __init__(self, job: Job, size: int, cpus: int, gpus: float = 0.0) -> None:
        import ray

        self.job = job
        # An actor that is given up must not come back: its partition is made anew, under another name.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._class = ray.remote(**options)(Worker)
        self._busy: dict[Any, Member] = {}
        self._starts_left = self._patience = _STARTS * size
        self.idle: list[Member] = []
        for _ in range(size):
            self._hire()

    def _hire(self) -> None:
        member = Member(self._class.remote(self.job))
        self._busy[member.actor.ready.remote()] = member

    def do(self, member: Member, task: Any, method: str, *args: Any) -> None:
        """Have an idle member do something; `finished` says when, with `task`."""
        self.idle.remove(member)
        member.task = task
        self._busy[getattr(member.actor, method).remote(*args)] = member

    def finished(self) -> list[tuple[Any, Any]]:
        """What has ended within POLL seconds: tasks, and their results; WorkerDied, or what a task raised."""
        import ray
        from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError, RayTaskError

        ended = []
        ready, _ = ray.wait(list(self._busy), timeout=POLL)
        check_ray()
        for reference in ready:
            member = self._busy.pop(reference)
            task, member.task = member.task, None
            try:
                result = ray.get(reference)
            except ActorUnschedulableError as error:
                raise UserError(f"the Ray cluster has no place for a worker: {_line(error)}") from None
            except (RayActorError, OutOfMemoryError) as error:
                result = WorkerDied(_line(error))
                self._replace(member, task is None, result)
            except RayTaskError as error:
                result = error.cause if isinstance(error.cause, UserError | OSError) else error
                self.idle.append(member)
            else:
                self._starts_left = self._patience
                self.idle.append(member)
            if task is not None:
                ended.append((task, result))
        return ended

    def _replace(self, member: Member, starting: bool, death: WorkerDied) -> None:
        """Take another for one that died; UserError where none comes up any more."""
        import ray

        ray.kill(member.actor)  # it may be out of reach, and still hold its place
        self._starts_left -= starting
        if not self._starts_left:
            raise UserError(
                f"workers die as they start ({death}); give them memory, and every node this program"
            )
        self._hire()

    def dismiss(self) -> None:
        """End all workers at once."""
        import ray

        for member in (*self.idle, *self._busy.values()):
            ray.kill(member.actor)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
