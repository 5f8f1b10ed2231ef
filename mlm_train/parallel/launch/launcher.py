"""Start the ranks of a run on this machine: torchrun's own agent, without its pages of output.

It starts them again after a failure where that is asked for, on as many machines as there are then.
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
from mlm_train.parallel.launch.rendezvous import LOOPBACK, met_at
from mlm_train.utils.run_lock import STARTED_AGAIN

USER_ERROR = 2  # exit code of a rank that has said in one line what is wrong
STOPPED = 128 + signal.SIGTERM  # of one that SIGTERM ended after a checkpoint
PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)  # the ranks know what to do (train/signals.py)
FINAL = {USER_ERROR, START_AGAIN, STOPPED}  # after these the ranks are not started again from here
STUCK, ROOM = 30, 600  # seconds until ranks that were asked to end are killed
LAST_CALL = 15.0  # seconds that fewer than all machines wait for another one


class Nodes(NamedTuple):
    """How many run this same command, and where they meet: HOST:PORT of one of them."""

    fewest: int = 1
    most: int = 1
    rendezvous: str | None = None


def launch_ranks(
    arguments: Sequence[str], processes: int, machines: Nodes | None = None, max_restarts: int = 0
) -> int:
    """Run `python -m mlm_train ARGUMENTS` on that many ranks here; the exit code of the whole.

    0; 2 where a rank found bad input and said so; 75 where the watchdog ended a hang; 85 or 143 where
    SIGUSR1 or SIGTERM did, after a checkpoint; otherwise 1, after a line that names the rank which failed
    first. The others are ended; after 1 and 75 all are started again, up to max_restarts times. Raises
    UserError where the machines cannot meet, PeerFailure where the run has ended on another one.
    """
    machines = machines or Nodes()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # which end the ranks at once
    if max_restarts or machines.most > machines.fewest:
        # The agent would give the ranks of every life one store, with the keys of those before.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = os.environ[STARTED_AGAIN] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    passed: list[signal.Signals] = []
    lives: list[int] = []
    meets: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if machines.rendezvous is not None:
        meets = met_at(machines.rendezvous, machines.fewest, lambda: bool(lives))
    try:
        with _passing_on(passed), meets:
            meeting = _meeting(machines)
            spec = WorkerSpec(
                role="ranks",
                local_world_size=processes,
                entrypoint=sys.executable,
                args=("-m", "mlm_train", *arguments),
                rdzv_handler=meeting,
                max_restarts=max_restarts,
                monitor_interval=0.2,
            )
            result = _Agent(spec, passed, lives).run()
    except SignalException as error:
        return _ended_by(error.sigval)
    if result is None:
        raise PeerFailure("the run has ended on other machines, without this one")
    meeting.shutdown()  # for all machines
    return _verdict(result.failures, passed) if result.is_failed() else 0


def _meeting(machines: Nodes) -> RendezvousHandler:
    """Where the agents agree on the ranks."""
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d" if machines.rendezvous else LOOPBACK,
            endpoint=machines.rendezvous or "",
            run_id=machines.rendezvous or uuid.uuid4().hex,
            min_nodes=machines.fewest,
            max_nodes=machines.most,
            last_call_timeout=LAST_CALL,
        )
    )


class _Agent(LocalElasticAgent):
    """Starts ranks again where that may help, and says so.

    passed: the signals that were given to the ranks. lives: grows by one where they are started.
    """

    def __init__(self, spec: WorkerSpec, passed: Sequence[signal.Signals], lives: list[int]) -> None:
        super().__init__(spec, logs_specs=DefaultLogsSpecs())
        self.passed, self.lives = passed, lives

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.lives.append(len(self.lives))
        return super()._start_workers(worker_group)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        # Ranks that are well make room for another machine: their step and checkpoint may take a while.
        self._shutdown_timeout = ROOM if worker_group.state == WorkerState.HEALTHY else STUCK
        super()._restart_workers(worker_group)
        self._shutdown_timeout = STUCK

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        if self.passed or self._is_final({failure.exitcode for failure in result.failures.values()}):
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            most = worker_group.spec.max_restarts
            number = most - self._remaining_restarts + 1
            print(
                f"mlm-train: {_first_failure(result.failures)}; the ranks here start again, from the newest "
                f"checkpoint: restart {number} of at most {most}",
                file=sys.stderr,
                flush=True,
            )
        return result

    def _is_final(self, codes: set[int]) -> bool:
        """Whether the ranks have said that starting them again is not wanted."""
        # Another machine's agent may have asked them to make room before this one knew.
        making_room = codes == {STOPPED} and self._worker_group.spec.rdzv_handler.num_nodes_waiting() > 0
        return bool(FINAL & codes) and not making_room


@contextlib.contextmanager
def _passing_on(passed: list[signal.Signals]) -> Iterator[None]:
    """Give PASSED_ON to the ranks and wait for them; the agent itself would kill them after 30 s."""

    def pass_on(number: int, _: FrameType | None) -> None:
        ranks = [child for child in psutil.Process().children() if _is_rank(child)]
        if not ranks:
            raise SignalException("before the ranks were started", signal.Signals(number))
        passed.append(signal.Signals(number))
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_rank(process: psutil.Process) -> bool:
    """Of the agent's children, those that train."""
    try:
        return "mlm_train" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


def _verdict(failures: dict[int, ProcessFailure], passed: Sequence[signal.Signals]) -> int:
    """The exit code for a run in which a rank did not return 0; its failures by rank."""
    # The first one of these to end has the agent end the others, which may have been about to say the same.
    codes = {failure.exitcode for failure in failures.values()}
    for code in (USER_ERROR, HUNG, START_AGAIN, STOPPED):
        if code in codes:
            return code
    _, first = _first(failures)
    if -first.exitcode in passed:  # before it listened
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
    """What a process's exit code says; negative ones are signals."""
    if exit_code >= 0:
        return f"exit code {exit_code}; its traceback is above"
    return f"killed by {signal.Signals(-exit_code).name}"
