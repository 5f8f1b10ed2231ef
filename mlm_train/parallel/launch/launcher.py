"""Start the ranks of a run on this node: torchrun's own agent, without its pages of output.

Where that is asked for, it restarts them after a failure, on as many nodes as there are then.
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import psutil
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from mlm_train.errors import HUNG, START_AGAIN, PeerFailure
from mlm_train.parallel.launch.rendezvous import LOOPBACK, rendezvous_errors
from mlm_train.utils.run_lock import STARTED_AGAIN

USER_ERROR = 2  # exit code of a rank that has reported bad input in one line
STOPPED = 128 + signal.SIGTERM  # exit code of a rank that SIGTERM ended after a checkpoint
FORWARDED = (signal.SIGUSR1, signal.SIGTERM)  # signals that the ranks handle (train/signals.py)
FINAL = {USER_ERROR, START_AGAIN, STOPPED}  # exit codes after which the ranks are not restarted
# Seconds until ranks that were asked to end are killed: after a failure, and where another node joins.
FAILED_SHUTDOWN_SECONDS, RESIZE_SHUTDOWN_SECONDS = 30, 600
LAST_CALL_SECONDS = 15.0  # how long fewer than all nodes wait for another one


class Nodes(NamedTuple):
    """How many nodes run this same command, and their rendezvous: HOST:PORT of one of them."""

    fewest: int = 1
    most: int = 1
    rendezvous: str | None = None


def launch_ranks(
    arguments: Sequence[str], processes: int, nodes: Nodes | None = None, max_restarts: int = 0
) -> int:
    """Run `python -m mlm_train ARGUMENTS` on `processes` ranks of this node; the exit code of the run.

    0; 2 where a rank reported bad input; 75 where the watchdog ended a hang; 85 or 143 where SIGUSR1 or
    SIGTERM ended it after a checkpoint; otherwise 1, after a line that names the rank which failed first.
    The other ranks are ended; after 1 and 75 all are restarted, up to max_restarts times. Raises UserError
    where the rendezvous of the nodes fails, PeerFailure where the run has ended on another node.
    """
    nodes = nodes or Nodes()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # these end the ranks at once
    if max_restarts or nodes.most > nodes.fewest:
        # Otherwise the agent gives all attempts one store, with the keys of earlier ones.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = os.environ[STARTED_AGAIN] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    forwarded: list[signal.Signals] = []
    attempts: list[int] = []
    errors: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if nodes.rendezvous is not None:
        errors = rendezvous_errors(nodes.rendezvous, nodes.fewest, lambda: bool(attempts))
    try:
        with _forwarding(forwarded), errors:
            rendezvous = _rendezvous(nodes)
            spec = WorkerSpec(
                role="ranks",
                local_world_size=processes,
                entrypoint=sys.executable,
                args=("-m", "mlm_train", *arguments),
                rdzv_handler=rendezvous,
                max_restarts=max_restarts,
                monitor_interval=0.2,
            )
            result = _Agent(spec, forwarded, attempts).run()
    except SignalException as error:
        return _ended_by(error.sigval)
    if result is None:
        raise PeerFailure("the run has ended on the other nodes, without this one")
    rendezvous.shutdown()  # on all nodes
    return _exit_code(result.failures, forwarded) if result.is_failed() else 0


def _rendezvous(nodes: Nodes) -> RendezvousHandler:
    """torchelastic's rendezvous, in which the agents agree on the ranks."""
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d" if nodes.rendezvous else LOOPBACK,
            endpoint=nodes.rendezvous or "",
            run_id=nodes.rendezvous or uuid.uuid4().hex,
            min_nodes=nodes.fewest,
            max_nodes=nodes.most,
            last_call_timeout=LAST_CALL_SECONDS,
        )
    )


class _Agent(LocalElasticAgent):
    """torchelastic's agent; restarts ranks where that may help, and logs it.

    forwarded: signals that were forwarded to the ranks. attempts: gets one entry per start of the ranks.
    """

    def __init__(self, spec: WorkerSpec, forwarded: Sequence[signal.Signals], attempts: list[int]) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs())
        self.forwarded, self.attempts = forwarded, attempts

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.attempts.append(len(self.attempts))
        return super()._start_workers(worker_group)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        # Healthy ranks end because another node joins: their step and checkpoint may take a while.
        healthy = worker_group.state == WorkerState.HEALTHY
        self._shutdown_timeout = RESIZE_SHUTDOWN_SECONDS if healthy else FAILED_SHUTDOWN_SECONDS
        super()._restart_workers(worker_group)
        self._shutdown_timeout = FAILED_SHUTDOWN_SECONDS

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        if self.forwarded or self._is_final({failure.exitcode for failure in result.failures.values()}):
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            most = worker_group.spec.max_restarts
            number = most - self._remaining_restarts + 1
            print(
                f"mlm-train: {_first_failure(result.failures)}; restarting the ranks of this node from the "
                f"newest checkpoint: restart {number} of at most {most}",
                file=sys.stderr,
                flush=True,
            )
        return result

    def _is_final(self, codes: set[int]) -> bool:
        """Whether the ranks have ended by exit codes after which they are not restarted."""
        # Another node's agent may have ended them because a node joins, before this agent knew.
        resizing = codes == {STOPPED} and self._worker_group.spec.rdzv_handler.num_nodes_waiting() > 0
        return bool(FINAL & codes) and not resizing


@contextlib.contextmanager
def _forwarding(forwarded: list[signal.Signals]) -> Iterator[None]:
    """Forward FORWARDED to the ranks and wait for them; the agent itself would kill them after 30 s."""

    def forward(number: int, _: FrameType | None) -> None:
        ranks = [child for child in psutil.Process().children() if _is_rank(child)]
        if not ranks:
            raise SignalException("before the ranks were started", signal.Signals(number))
        forwarded.append(signal.Signals(number))
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_rank(process: psutil.Process) -> bool:
    """Whether a child process of the agent is a rank."""
    try:
        return "mlm_train" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


def _exit_code(failures: dict[int, ProcessFailure], forwarded: Sequence[signal.Signals]) -> int:
    """The exit code of a run in which a rank did not return 0. failures: by rank."""
    # The agent ends the other ranks when the first one ends: any rank may hold the code that counts.
    codes = {failure.exitcode for failure in failures.values()}
    for code in (USER_ERROR, HUNG, START_AGAIN, STOPPED):
        if code in codes:
            return code
    _, first = _first(failures)
    if -first.exitcode in forwarded:  # before the rank's signal handlers were set
        return _ended_by(signal.Signals(-first.exitcode))
    print(f"mlm-train: {_first_failure(failures)}", file=sys.stderr)
    return 1


def _first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first."""
    return min(failures.items(), key=lambda entry: entry[1].timestamp)


def _first_failure(failures: dict[int, ProcessFailure]) -> str:
    rank, failure = _first(failures)
    return f"rank {rank} failed first: {_reason(failure.exitcode)}"


def _ended_by(number: signal.Signals) -> int:
    print(f"mlm-train: ended by {number.name}", file=sys.stderr)
    return 128 + number


def _reason(exit_code: int) -> str:
    """Text for a process's exit code; negative ones are signals."""
    if exit_code >= 0:
        return f"exit code {exit_code}; its traceback is above"
    return f"killed by {signal.Signals(-exit_code).name}"
