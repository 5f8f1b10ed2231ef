"""Where a rank's main thread is: set by it at next to no cost, read by the watchdog's thread.

Also how long it computes without waiting for other ranks, which tells a slow rank from those it delays.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.distributed.pipelining import PipelineStage


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


class MarkedStage(PipelineStage):
    """A pipeline stage that marks the micro-batch which it computes or waits for."""

    def __init__(self, marker: ProgressMarker, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marker = marker

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.marker.at("forward", self.stage_index, fwd_chunk_id)
        with self.marker.forwards.running():
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self.marker.at("waiting after forward", self.stage_index, fwd_chunk_id)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not self.has_backward:  # in evaluation
            return None
        self.marker.at("backward", self.stage_index, bwd_chunk_id)
        output = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self.marker.at("waiting after backward", self.stage_index, bwd_chunk_id)
        return output

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not self.has_backward:
            return None
        self.marker.at("weights' backward", self.stage_index, bwd_chunk_id)
        output = super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        self.marker.at("waiting after weights' backward", self.stage_index, bwd_chunk_id)
        return output

    # Where a rank holds two neighbouring stages (zbv, dualpipe_v), torch passes gradients from one to the
    # other in evaluation too, where there are none, and fails.
    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else None

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self._marked(super().get_fwd_recv_ops(fwd_chunk_id), "activation", fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self._marked(super().get_bwd_recv_ops(bwd_chunk_id), "gradient", bwd_chunk_id)

    def _marked(self, operations: list[Any], what: str, micro_batch: int) -> list[Any]:
        if operations:
            self.marker.at(f"receive {what}", self.stage_index, micro_batch)
        return operations
