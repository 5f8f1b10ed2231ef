"""Which rank failed first: its traceback is shown, the others report in one line that they stop."""

import contextlib
import faulthandler
import re
import time
import traceback
from pathlib import Path

from mlm_train.errors import PeerFailure, SharedUserError
from mlm_train.parallel.health.peers import FAILED_EVENT, HUNG_EVENT, Peers
from mlm_train.parallel.health.status_store import with_timeout
from mlm_train.parallel.health.thread_stacks import append

# Errors of gloo, NCCL and the store when a peer is gone, and in any communication.
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Connection refused|remote process exited")
_COMMUNICATION = re.compile(r"gloo|NCCL|[Tt]imed out|[Tt]imeout|socket|TCPStore|c10d", re.IGNORECASE)
RECORD_SECONDS = 3.0  # how long a peer's message may take to appear after its sockets closed
EXIT_SECONDS = 60.0  # how long a failed rank may take to exit


def one_line(error: BaseException) -> str:
    """Type and first line of the root cause: torch's pipeline wraps a stage's error in one of its own."""
    cause = _root_cause(error)
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0][:300]}"


def _root_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root_cause(error.__cause__)


def folder_of(output: Path, when: str) -> Path:
    """Where ranks write their stacks and tracebacks."""
    return output / "failures" / when


def now() -> str:
    """The current local time as a folder name, for `folder_of`."""
    return time.strftime("%Y-%m-%d_%H-%M-%S")


def explain_failure(error: Exception, peers: Peers, position: str, output: Path, linger: float) -> None:
    """Return where this rank failed first: the caller raises its error. Otherwise raise PeerFailure.

    `position`: where the rank was (step, stage, micro-batch), added to the traceback. The traceback of a rank
    that failed later is written to the run's folder. `linger`: seconds in which the others read the store.
    """
    if isinstance(error, SharedUserError | PeerFailure):
        return  # raised on all ranks alike, or naming the other rank already
    with contextlib.suppress(ValueError, OSError, AttributeError):  # stderr may not be a file
        # Shutting down a library that still waits for a peer must not keep a failed rank alive.
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
    cause = _root_cause(error)
    lost = isinstance(cause, RuntimeError) and _LOST.search(str(cause))
    communication = isinstance(cause, RuntimeError) and _COMMUNICATION.search(str(cause))
    if communication or lost:
        peers.event_within(RECORD_SECONDS)
    reason = "lost the connection to another rank" if lost else one_line(error)
    own = {"kind": FAILED_EVENT, "rank": peers.rank, "error": reason, "when": now()}
    first = peers.claim(own)
    is_first = first["rank"] == peers.rank and first["kind"] == FAILED_EVENT
    hung = first["kind"] == HUNG_EVENT
    if (is_first and not lost) or (hung and not lost and not communication):
        error.add_note(f"on rank {peers.rank} of {peers.world}: {position}")
        if peers.store.hosted_here:
            time.sleep(linger)  # the store ends with this process: let the others read who failed
        return
    path = folder_of(output, first["when"]) / f"{peers.name}.tracebacks.txt"
    written = with_timeout(lambda: _add_traceback(path, error, peers.rank), 5)
    where = f" (traceback: {path})" if written is not None else ""
    if is_first:
        raise PeerFailure(
            f"stopped in {position}: lost the connection to another rank, which was killed or whose node is "
            f"gone{where}"
        ) from error
    if hung:
        time.sleep(EXIT_SECONDS / 2)  # this rank's watchdog ends it, with the exit code of a hang
        raise PeerFailure(f"stopped because rank {first['rank']} reports a hang{where}") from error
    shown = "" if communication or lost else f"; own error: {one_line(error)}{where}"
    raise PeerFailure(
        f"stopped because rank {first['rank']} failed first: {first['error']}{shown}"
    ) from error


def _add_traceback(path: Path, error: Exception, rank: int) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    append(path, f"rank {rank}:\n{''.join(traceback.format_exception(error))}\n")
    return True
