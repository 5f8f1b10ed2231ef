"""Where a rank's main thread is: set by it at next to no cost, read by the watchdog's thread.

Also how long it computes without waiting for other ranks, which tells a slow rank from those it delays.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Mark(NamedTuple):
    """What the main thread is doing, and since when."""

    task: str  # "step 3", "checkpoint of step 3", ...
    patient: bool  # whether the task may take long
    phase: str  # "data", "forward", ...
    stage: int | None
    micro_batch: int | None
    since: float  # time.monotonic()

    def __str__(self) -> str:
        micro_batch = "" if self.micro_batch is None else f" of micro-batch {self.micro_batch}"
        return f"{self.task}, {self.phase}{micro_batch}"


class Stopwatch:
    """Seconds that a device spends on the work queued in timed regions."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self.events: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the body."""
        if self.device.type == "cpu":
            started = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - started
            return
        start, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.events.append((start, end))

    def read(self) -> float:
        """Seconds since the last call; waits for the device."""
        seconds = self.seconds
        for start, end in self.events:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3  # elapsed_time is in milliseconds
        self.seconds = 0.0
        self.events.clear()
        return seconds


class ProgressMarker:
    """The latest mark. Replacing it is one assignment: no lock, no system call."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.forwards = Stopwatch(device or torch.device("cpu"))
        self.enter("start-up", patient=True)

    def enter(self, task: str, patient: bool = False) -> None:
        """Start a task; `patient`: one that may take long without being a hang."""
        self.mark = Mark(task, patient, "begin", None, None, time.monotonic())

    def at(self, phase: str, stage: int | None = None, micro_batch: int | None = None) -> None:
        """Enter another phase of the task."""
        task, patient, *_ = self.mark
        self.mark = Mark(task, patient, phase, stage, micro_batch, time.monotonic())

    def linger(self) -> None:
        """Restart the clock of the current phase, and allow it to take long."""
        self.mark = self.mark._replace(patient=True, since=time.monotonic())
