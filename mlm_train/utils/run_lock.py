"""Lock a run's folder for one process, and for the newest attempt of a job that Slurm restarted.

When a node's slurmd dies, its ranks keep running beside the restarted job and hold the folder's lock. So
each attempt writes its number to a file beside the folder. An attempt that reads a newer number there ends
at once and commits nothing more; the newer one waits for the lock.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mlm_train.errors import UserError, escaped
from mlm_train.utils.files import locked, write_text
from mlm_train.utils.records import Record, json_value, read_regular

POLL_SECONDS = 3.0
STARTED_AGAIN = "MLM_STARTED_AGAIN"  # set where an agent may restart the ranks
PATIENCE_SECONDS = 120.0  # a shared file system takes 90 s to release the locks of a lost machine


class SlurmAttempt(Record):
    """A Slurm job and how often it has been restarted; also the file beside a folder."""

    job: str
    restart: Annotated[int, Field(strict=True, ge=0)]

    @classmethod
    def here(cls) -> "SlurmAttempt | None":
        """This process's attempt; None outside Slurm."""
        job = os.environ.get("SLURM_JOB_ID")
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return None if job is None else cls(job=job, restart=restart)

    @classmethod
    def suffix(cls) -> str:
        """A suffix for names of unfinished files, so that no two attempts write the same one."""
        attempt = cls.here()
        return "" if attempt is None else f".{attempt.job}-{attempt.restart}"

    def follows(self, other: "SlurmAttempt | None") -> bool:
        """Whether this is a later attempt of the same job."""
        return other is not None and other.job == self.job and other.restart < self.restart

    def __str__(self) -> str:
        return f"restart {self.restart} of job {self.job}"


@contextlib.contextmanager
def owned(folder: Path, doing: str) -> Iterator[None]:
    """Lock a folder like `files.locked`; take it over from an earlier attempt of the same Slurm job.

    Raises UserError where another process holds it, or a later attempt has taken it over.
    """
    attempt = SlurmAttempt.here()
    if attempt is None:
        # Restarted ranks may meet their predecessors, still running on a lost machine.
        with locked(folder, doing, PATIENCE_SECONDS if STARTED_AGAIN in os.environ else 0.0):
            yield
        return
    refuse_superseded(folder)
    patience = 0.0
    if attempt.follows(before := _recorded(folder)):
        _record(folder, attempt)  # the earlier attempt reads it and ends, if it still runs
        line = f"{folder}: {attempt} takes over from {before}"
        print(f"mlm-train: {escaped(line)}", file=sys.stderr)
        patience = PATIENCE_SECONDS
    with locked(folder, doing, patience):
        _record(folder, attempt)
        with _watching(folder):
            yield
        if _recorded(folder) == attempt:
            _path(folder).unlink(missing_ok=True)


def refuse_superseded(folder: Path) -> None:
    """Raise UserError where a later attempt of this process's job has taken over the folder."""
    attempt, recorded = SlurmAttempt.here(), _recorded(folder)
    if attempt is not None and recorded is not None and recorded.follows(attempt):
        raise UserError(f"{folder} was taken over by {recorded}; {attempt} ends and writes nothing more")


def _path(folder: Path) -> Path:
    """The attempt's file: beside the folder, which holds the user's files only."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.attempt")


def _record(folder: Path, attempt: SlurmAttempt) -> None:
    _path(folder).parent.mkdir(parents=True, exist_ok=True)
    write_text(_path(folder), attempt.model_dump_json())


def _recorded(folder: Path) -> SlurmAttempt | None:
    """The attempt that took the folder last; None where there is none, or it cannot be read now."""
    try:
        return SlurmAttempt.model_validate(json_value(read_regular(_path(folder))))
    except (OSError, ValueError, UserError):
        return None


@contextlib.contextmanager
def _watching(folder: Path) -> Iterator[None]:
    """End this process once a later attempt has taken over the folder, whatever the main thread does."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            try:
                refuse_superseded(folder)
            except UserError as error:
                with contextlib.suppress(OSError):
                    os.write(2, f"mlm-train: {escaped(str(error))}\n".encode())
                os._exit(2)

    thread = threading.Thread(target=watch, name="ownership", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
