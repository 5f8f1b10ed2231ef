"""torchrun's agent, one per node: starts the ranks of its node, and starts them again where that may help."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from torch.distributed import Store
from torch.distributed.elastic.agent.server import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousGracefulExitError

from mlm_train.errors import START_AGAIN
from mlm_train.parallel.launch.rendezvous import Members, start_of_ranks, wait_at_most
from mlm_train.utils.run_lock import LAUNCH

USER_ERROR = 2  # exit code of a rank that has reported bad input in one line
STOPPED = 128 + signal.SIGTERM  # exit code of a rank that SIGTERM ended after a checkpoint
FINAL = {USER_ERROR, START_AGAIN, STOPPED}  # exit codes after which the ranks are not restarted
# Seconds until ranks that were asked to end are killed: after a failure, and where another node joins.
FAILED_SHUTDOWN_SECONDS, RESIZE_SHUTDOWN_SECONDS = 30, 600
# Seconds to wait for enough nodes; in a Slurm job a lost one does not come back.
JOIN_SECONDS, LOSS_SECONDS = 600.0, 90.0


class Agent(LocalElasticAgent):
    """torchelastic's agent, which also notices a node that is gone, and knows the numbers of nodes that fit.

    fitting: those numbers; the run takes the largest one that it finds, and the other nodes wait.
    forwarded: signals that were forwarded to the ranks. restarts: whether the ranks may be started again.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        fitting: Sequence[int],
        forwarded: Sequence[signal.Signals],
        restarts: bool,
    ) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs())
        self.fitting, self.forwarded, self.restarts = fitting, forwarded, restarts
        self.starts = 0  # of ranks on this node
        self.waits = False  # this node has joined, but the run does not use it
        self.members = Members(spec.rdzv_handler, 0)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        joined = worker_group.group_world_size
        assert joined is not None
        worker_group.group_world_size = used = self._used(joined)
        before, self.members = self.members, Members(worker_group.spec.rdzv_handler, used)
        if self.waits:
            _say(f"{joined} nodes have joined, and the run fits {used} of them: this one waits")
        elif worker_group.group_rank == 0 and (change := self.members.change_from(before)):
            _say(change)

    def _used(self, joined: int) -> int:
        """How many of the nodes the run uses. The rendezvous has as many as the smallest number that fits."""
        return max(number for number in self.fitting if number <= joined)

    def _assign_worker_ranks(
        self, store: Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        used = self._used(group_world_size)
        self.waits = group_rank >= used
        return [] if self.waits else super()._assign_worker_ranks(store, group_rank, used, spec)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self.waits:
            self._pcontext = None
            return {}
        self.starts += 1
        if self.restarts:
            assert worker_group.store is not None and worker_group.group_rank is not None
            os.environ[LAUNCH] = start_of_ranks(worker_group.store, worker_group.group_rank)
        return super()._start_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        gone = self.members.gone()  # the ranks may wait for it, deaf to SIGTERM
        # Healthy ranks end because another node joins: their step and checkpoint may take a while.
        resizes = worker_group.state == WorkerState.HEALTHY and not gone
        returns = resizes or "SLURM_JOB_ID" not in os.environ
        wait_at_most(worker_group.spec.rdzv_handler, JOIN_SECONDS if returns else LOSS_SECONDS)
        self._shutdown(
            signal.SIGKILL if gone else signal.SIGTERM,
            RESIZE_SHUTDOWN_SECONDS if resizes else FAILED_SHUTDOWN_SECONDS,
        )

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        gone = self.members.gone()
        if self.waits:
            if worker_group.spec.rdzv_handler.is_closed():
                raise RendezvousGracefulExitError
            if gone:
                self._restart_workers(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY and gone:
            self._say_restart(f"{gone} has left the run: lost, or starting its ranks again")
            return RunResult(state=WorkerState.FAILED)
        if result.state == WorkerState.FAILED:
            if self.forwarded or self._is_final({failure.exitcode for failure in result.failures.values()}):
                self._remaining_restarts = 0
            self._say_restart(first_failure(result.failures))
        return result

    def _say_restart(self, reason: str) -> None:
        if not self._remaining_restarts:
            return
        most = self._worker_group.spec.max_restarts
        number = most - self._remaining_restarts + 1
        _say(
            f"{reason}; restarting the ranks of this node from the newest checkpoint: "
            f"restart {number} of at most {most}"
        )

    def _is_final(self, codes: set[int]) -> bool:
        """Whether the ranks have ended by exit codes after which they are not restarted."""
        # Another node's agent may have ended them because a node joins, before this agent knew.
        resizing = codes == {STOPPED} and self._worker_group.spec.rdzv_handler.num_nodes_waiting() > 0
        return bool(FINAL & codes) and not resizing


def first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and how."""
    return min(failures.items(), key=lambda entry: entry[1].timestamp)


def first_failure(failures: dict[int, ProcessFailure]) -> str:
    """The same as text."""
    rank, failure = first(failures)
    return f"rank {rank} failed first: {_reason(failure.exitcode)}"


def _reason(exit_code: int) -> str:
    """Text for a process's exit code; negative ones are signals."""
    if exit_code >= 0:
        return f"exit code {exit_code}; its traceback is above"
    return f"killed by {signal.Signals(-exit_code).name}"


def _say(line: str) -> None:
    print(f"mlm-train: {line}", file=sys.stderr, flush=True)
