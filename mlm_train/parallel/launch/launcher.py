"""Start the ranks of a run on this node: torchrun's own agent, without its pages of output.

Where that is asked for, it restarts them after a failure, on as many nodes as there are then (agent.py).
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple

import psutil
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from mlm_train.errors import HUNG, START_AGAIN, escaped
from mlm_train.parallel.launch.agent import STOPPED, USER_ERROR, Agent, first, first_failure
from mlm_train.parallel.launch.rendezvous import LOOPBACK, EndedElsewhere, NoHost, rendezvous_errors

FORWARDED = (signal.SIGUSR1, signal.SIGTERM)  # signals that the ranks handle (train/signals.py)
LAST_CALL_SECONDS = 15.0  # how long fewer than all nodes wait for another one


class Nodes(NamedTuple):
    """The numbers of nodes on which the run fits, ascending, and their rendezvous: HOST:PORT of one of them.

    Each of them runs this same command; so may further ones, which wait and replace a lost one.
    """

    fitting: tuple[int, ...] = (1,)
    rendezvous: str | None = None


def launch_ranks(
    arguments: Sequence[str], processes: int, nodes: Nodes | None = None, max_restarts: int = 0
) -> int:
    """Run `python -m mlm_train ARGUMENTS` on `processes` ranks of this node; the exit code of the run.

    0; 2 where a rank reported bad input; 75 where the watchdog ended a hang; 85 or 143 where SIGUSR1 or
    SIGTERM ended it after a checkpoint; otherwise 1, after a line that names the rank which failed first.
    The other ranks are ended; after 1 and 75 all are restarted, up to max_restarts times. Raises UserError
    where the rendezvous of the nodes fails, PeerFailure where the run has ended on another node. A node that
    the run has not needed to the end returns 0; so does a lost or late one in a Slurm job.
    """
    nodes = nodes or Nodes()
    restarts = max_restarts > 0 or len(nodes.fitting) > 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # these end the ranks at once
    if restarts:  # otherwise the agent gives all starts one store, with the keys of earlier ones
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    forwarded: list[signal.Signals] = []
    agent: Agent | None = None
    errors: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if nodes.rendezvous is not None:
        errors = rendezvous_errors(nodes.rendezvous, nodes.fitting[0], lambda: bool(agent and agent.starts))
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
            agent = Agent(spec, nodes.fitting, forwarded, restarts)
            result = agent.run()
    except SignalException as error:
        if error.sigval == signal.SIGUSR1 and nodes.rendezvous is not None:
            return START_AGAIN  # as the other nodes, whose ranks save a checkpoint
        return _ended_by(error.sigval)
    except (EndedElsewhere, NoHost) as error:
        if not restarts or "SLURM_JOB_ID" not in os.environ:
            raise
        print(f"mlm-train: {escaped(str(error))}", file=sys.stderr)
        return 0  # the job takes the highest exit code: the nodes that the run uses decide, not a lost one
    if result is None:
        print("mlm-train: the run has ended on the other nodes, without this one", file=sys.stderr)
        return 0
    rendezvous.shutdown()  # on all nodes
    return _exit_code(result.failures, forwarded) if result.is_failed() else 0


def _rendezvous(nodes: Nodes) -> RendezvousHandler:
    """torchelastic's rendezvous, in which the agents agree on the ranks."""
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d" if nodes.rendezvous else LOOPBACK,
            endpoint=nodes.rendezvous or "",
            run_id=nodes.rendezvous or uuid.uuid4().hex,
            min_nodes=nodes.fitting[0],
            max_nodes=nodes.fitting[-1],
            last_call_timeout=LAST_CALL_SECONDS,
        )
    )


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
    if not failures:  # the agent has ended the ranks, and said why
        return 1
    _, failure = first(failures)
    if -failure.exitcode in forwarded:  # before the rank's signal handlers were set
        return _ended_by(signal.Signals(-failure.exitcode))
    print(f"mlm-train: {first_failure(failures)}", file=sys.stderr)
    return 1


def _ended_by(number: signal.Signals) -> int:
    print(f"mlm-train: ended by {number.name}", file=sys.stderr)
    return 128 + number
