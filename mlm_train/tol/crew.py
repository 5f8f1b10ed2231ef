"""The workers of a build, on as many nodes as there are: who is idle, who has died, what they were doing."""

from dataclasses import dataclass
from typing import Any

from mlm_train.errors import UserError
from mlm_train.tol.worker import Job, Worker

POLL = 0.5  # seconds


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
        """What has ended within POLL seconds: tasks, and their results or WorkerDied.

        Errors that a task itself raised are raised here.
        """
        import ray
        from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

        ended = []
        ready, _ = ray.wait(list(self._busy), timeout=POLL)
        for reference in ready:
            member = self._busy.pop(reference)
            task, member.task = member.task, None
            try:
                result = ray.get(reference)
            except ActorUnschedulableError as error:
                raise UserError(f"the Ray cluster has no place for a worker: {_line(error)}") from None
            except RayActorError as error:
                result = WorkerDied(_line(error))
                self._hire()
            except RayTaskError as error:
                if isinstance(error.cause, UserError | OSError):
                    raise error.cause from None
                raise
            else:
                self.idle.append(member)
            if task is not None:
                ended.append((task, result))
        return ended

    def dismiss(self) -> None:
        """End all workers at once."""
        import ray

        for member in (*self.idle, *self._busy.values()):
            ray.kill(member.actor)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
