"""Progress with speed and remaining time on standard error: a bar, or log lines."""

import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)

from mlm_train.utils.units import in_units

Item = TypeVar("Item")
LINE_EVERY = 60.0  # seconds between log lines


def tracked(items: Sequence[Item], what: str, show: bool = True) -> Iterable[Item]:
    """The items, with a progress bar on standard error while they are gone through, if that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, disable=not (show and console.is_terminal), transient=True)


class ByteProgress:
    """A progress bar over a number of bytes; a context manager. Without a terminal, a line per minute."""

    def __init__(self, what: str, total: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn(what),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=total)
        self._what, self._total = what, total
        self._first: tuple[float, int] | None = None  # time and bytes of the first call
        self._line = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, done: int) -> None:
        """Move the bar to `done` bytes."""
        self._progress.update(self._task, completed=done)
        if self._progress.disable:
            self._log(done)

    def _log(self, done: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._line = (now, done), now
        if now - self._line < LINE_EVERY:
            return
        self._line = now
        since, before = self._first
        speed = (done - before) / (now - since)
        left = f", {timedelta(seconds=round((self._total - done) / speed))} left" if speed else ""
        line = f"{self._what}: {in_units(done)} of {in_units(self._total)}, {in_units(speed)}/s{left}"
        print(line, file=sys.stderr, flush=True)
