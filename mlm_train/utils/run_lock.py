"""Lock a run's folder for one process, and for the newest attempt of a job or a launch that was restarted.

When a node is given up, its ranks may keep running beside the restarted ones and hold the folder's lock. So
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
LAUNCH = "MLM_LAUNCH"  # `LAUNCH NUMBER`, set where an agent may restart the ranks (launch/agent.py)
PATIENCE_SECONDS = 120.0  # a shared file system takes 90 s to release the locks of a lost machine


class Attempt(Record):
    """A Slurm job and how often it has been restarted, or a launch and which start of its ranks this is, or
    both; also the file beside a folder.

    start: counted from 1; 0 where no agent may start the ranks again.
    """

    job: str | None = None
    restart: Annotated[int, Field(strict=True, ge=0)] = 0
    launch: str = ""
    start: Annotated[int, Field(strict=True, ge=0)] = 0

    @classmethod
    def here(cls) -> "Attempt | None":
        """This process's attempt; None outside Slurm where nothing restarts it."""
        job, (launch, _, start) = os.environ.get("SLURM_JOB_ID"), os.environ.get(LAUNCH, "").partition(" ")
        if job is None and not launch:
            return None
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0) if job else 0
        return cls(job=job, restart=restart, launch=launch, start=int(start or 0))

    @classmethod
    def suffix(cls) -> str:
        """A suffix for names of unfinished files, so that no two attempts write the same one."""
        attempt = cls.here()
        if attempt is None:
            return ""
        job = [] if attempt.job is None else [attempt.job, str(attempt.restart)]
        return "." + "-".join([*job, *([attempt.launch[:8], str(attempt.start)] if attempt.launch else [])])

    def follows(self, other: "Attempt | None") -> bool:
        """Whether this is a later attempt of the same job or launch."""
        if other is None or other.job != self.job:
            return False
        if self.job is not None and other.restart != self.restart:
            return other.restart < self.restart
        return other.launch == self.launch and other.start < self.start

    def __str__(self) -> str:
        job = f"restart {self.restart} of job {self.job}"
        if not self.launch:
            return job
        return f"start {self.start} of {f'the ranks in {job}' if self.job else f'launch {self.launch[:8]}'}"


@contextlib.contextmanager
def owned(folder: Path, doing: str) -> Iterator[None]:
    """Lock a folder like `files.locked`; take it over from an earlier attempt of the same job or launch.

    Raises UserError where another process holds it, or a later attempt has taken it over.
    """
    attempt = Attempt.here()
    if attempt is None:
        with locked(folder, doing):
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
    """Raise UserError where a later attempt of this process's job or launch has taken over the folder."""
    attempt, recorded = Attempt.here(), _recorded(folder)
    if attempt is not None and recorded is not None and recorded.follows(attempt):
        raise UserError(f"{folder} was taken over by {recorded}; {attempt} ends and writes nothing more")


def _path(folder: Path) -> Path:
    """The attempt's file: beside the folder, which holds the user's files only."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.attempt")


def _record(folder: Path, attempt: Attempt) -> None:
    _path(folder).parent.mkdir(parents=True, exist_ok=True)
    write_text(_path(folder), attempt.model_dump_json())


def _recorded(folder: Path) -> Attempt | None:
    """The attempt that took the folder last; None where there is none, or it cannot be read now."""
    try:
        return Attempt.model_validate(json_value(read_regular(_path(folder))))
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
