"""The results of steps; a GPU's are read one step late, so that it never waits for the CPU between steps."""

from collections import deque
from dataclasses import dataclass, replace
from signal import Signals as Signal

import torch

from mlm_train.monitor.report import Progress, SkippedStep, StepReport
from mlm_train.train.guard import LossGuard, roll_back
from mlm_train.train.setup import Run
from mlm_train.train.step import LaunchedStep


def reads_late(device: torch.device) -> bool:
    """Whether a step may still be running there once it is launched."""
    return device.type != "cpu"


@dataclass(frozen=True)
class Launch:
    """A launched step, and the progress after it if it is not skipped. batch: the global batch size."""

    step: LaunchedStep
    progress: Progress
    lr: float
    batch: int
    data_seconds: float


class Results:
    """Reads the results of launched steps in order, notifies callbacks, and has the guard judge them.

    asked: the signal to end the run, if a result has brought one. sound: whether the latest step that was
    read was not skipped.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.guard = run, LossGuard(run.config)
        self.launches: deque[Launch] = deque()
        self.late = int(reads_late(run.runtime.device))
        self.skipped = run.progress.skipped
        self.asked: Signal | None = None
        self.sound = True

    def add(self, launch: Launch) -> None:
        """Note a step whose results are not read yet."""
        self.launches.append(launch)

    def read(self, all_steps: bool) -> Progress | None:
        """Read what is there; the latest step's too with all_steps, on a CPU, or once `asked`.

        Returns the progress that a loss spike has taken the run back to; a step launched after it is dropped.
        """
        while len(self.launches) > (0 if all_steps or self.asked else self.late):
            launch = self.launches.popleft()
            back = self._judge(launch)
            if back is not None:
                self.launches.clear()
                return back
        return None

    def _judge(self, launch: Launch) -> Progress | None:
        """Read a step's results and notify callbacks; the progress of a rollback."""
        run, result = self.run, launch.step.result()
        self.sound = result.fault is None
        self.skipped += not self.sound
        self.asked = self.asked or result.asked
        progress = replace(launch.progress, skipped=self.skipped)
        if result.fault is not None:
            run.callbacks.on_fault(SkippedStep(progress, result.fault))
        consumed = run.consumed(progress)
        run.callbacks.after_step(
            StepReport(progress, launch.lr, launch.batch, result, launch.data_seconds, consumed)
        )
        self.guard.refuse_divergence(progress, result)
        return roll_back(run, progress) if self.guard.sees_spike(result) else None
