"""Who may write a folder: one process at a time, and of a job that Slurm started again the newest attempt.

Where a node's slurmd dies, its ranks live on beside the restarted job, and hold the folder's lock. So each
attempt leaves its number in a note beside the folder. One that reads a newer number there ends itself at
once, and commits nothing any more; the newer one waits for the lock.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from mlm_train.errors import UserError, escaped
from mlm_train.utils.files import locked, write_text
from mlm_train.utils.records import Record, json_value, read_regular

LOOK_SECONDS = 3.0
STARTED_AGAIN = "MLM_STARTED_AGAIN"  # set where an agent may start the ranks again
PATIENCE_SECONDS = 120.0  # a shared file system takes 90 s to forget the locks of a machine that is gone


class SlurmAttempt(NamedTuple):
    """A Slurm job, and how often it has been started again."""

    job: str
    restart: int

    @classmethod
    def here(cls) -> "SlurmAttempt | None":
        """This process's; None outside Slurm."""
        job = os.environ.get("SLURM_JOB_ID")
        return None if job is None else cls(job, int(os.environ.get("SLURM_RESTART_COUNT") or 0))

    @classmethod
    def suffix(cls) -> str:
        """For names of unfinished files: no two attempts write the same one."""
        attempt = cls.here()
        return "" if attempt is None else f".{attempt.job}-{attempt.restart}"

    def follows(self, other: "SlurmAttempt | None") -> bool:
        """Whether it is a later attempt of the same job."""
        return other is not None and other.job == self.job and other.restart < self.restart

    def __str__(self) -> str:
        return f"restart {self.restart} of job {self.job}"


class _Note(Record):
    """What the file beside a folder says: an Attempt."""

    job: str
    restart: Annotated[int, Field(strict=True, ge=0)]


@contextlib.contextmanager
def owned(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder as `files.locked` does; take it from an earlier attempt of the same Slurm job.

    Raises UserError where another process holds it, or a later attempt has taken it.
    """
    attempt = SlurmAttempt.here()
    if attempt is None:
        # Ranks that were started again may meet those before them, on a machine that was given up.
        with locked(folder, doing, PATIENCE_SECONDS if STARTED_AGAIN in os.environ else 0.0):
            yield
        return
    refuse_superseded(folder)
    patience = 0.0
    if attempt.follows(before := _noted(folder)):
        _note(folder, attempt)  # the one before reads it and goes, where it still lives
        line = f"{folder}: {attempt} takes over from {before}"
        print(f"mlm-train: {escaped(line)}", file=sys.stderr)
        patience = PATIENCE_SECONDS
    with locked(folder, doing, patience):
        _note(folder, attempt)
        with _watching(folder):
            yield
        if _noted(folder) == attempt:
            _path(folder).unlink(missing_ok=True)


def refuse_superseded(folder: Path) -> None:
    """UserError where a later attempt of this process's job has taken the folder."""
    attempt, noted = SlurmAttempt.here(), _noted(folder)
    if attempt is not None and noted is not None and noted.follows(attempt):
        raise UserError(f"{folder} was taken over by {noted}; {attempt} ends and writes nothing more")


def _path(folder: Path) -> Path:
    """Beside the folder: inside it, it would be one of the user's files."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.attempt")


def _note(folder: Path, attempt: SlurmAttempt) -> None:
    _path(folder).parent.mkdir(parents=True, exist_ok=True)
    write_text(_path(folder), json.dumps(attempt._asdict()))


def _noted(folder: Path) -> SlurmAttempt | None:
    """Who was the last to take the folder; None where nobody did, or it cannot be read now."""
    try:
        return SlurmAttempt(**_Note.model_validate(json_value(read_regular(_path(folder)))).model_dump())
    except (OSError, ValueError, UserError):
        return None


@contextlib.contextmanager
def _watching(folder: Path) -> Iterator[None]:
    """End this process once a later attempt has taken the folder, whatever the main thread does."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
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
