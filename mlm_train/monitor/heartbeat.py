"""heartbeat.json: the state of a run, for programs that watch many runs."""

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from mlm_train.monitor.callback import Callback, Context
from mlm_train.monitor.report import Progress, StepReport
from mlm_train.monitor.time_left import TimeLeft
from mlm_train.utils.run_lock import Attempt

INTERVAL = 1.0  # least seconds between writes


class HeartbeatFile:
    """Writes heartbeat.json, atomically: the latest finished step, and its time.

    An old time means that the run hangs. Write errors are ignored.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.next = folder / "heartbeat.json", 0.0
        self.values: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        if (attempt := Attempt.here()) is not None and attempt.job is not None:
            self.values["job"] = str(attempt)

    def beat(self, state: str, **values: Any) -> None:
        """Update its values; a change of `state` is written at once."""
        now = time.monotonic()  # wall time may be set back
        changed = self.values.get("state") != state
        self.values |= {"state": state, "time": time.time()} | values
        if not changed and now < self.next:
            return
        self.next = now + INTERVAL
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(self.values) + "\n", encoding="utf-8")
            draft.replace(self.path)
        except OSError:  # a full disk: retry at the next beat
            self.next = now


class Heartbeat(Callback):
    """Writes heartbeat.json of a run, on rank 0."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.time_left = TimeLeft(self.config.train.steps)
        self.file: HeartbeatFile | None = None

    def on_train_start(self, progress: Progress) -> None:
        train = self.config.train
        if self.context.runtime.is_rank_0:
            self.file = HeartbeatFile(Path(train.output))
            self.file.beat("starting", step=progress.step, steps=train.steps)

    def after_step(self, report: StepReport) -> None:
        if self.file is None:
            return
        progress, result = report.progress, report.result
        self.file.beat(
            "training",
            step=progress.step,
            loss=result.loss if math.isfinite(result.loss) else None,
            step_seconds=round(report.seconds, 3),
            seconds_left=round(self.time_left.after(report)),
            skipped=progress.skipped,
        )

    def on_train_end(self) -> None:
        if self.file is not None:
            done = self.file.values["step"] >= self.config.train.steps
            self.file.beat("finished" if done else "ended")
