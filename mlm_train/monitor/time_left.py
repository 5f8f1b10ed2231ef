"""Estimate of the remaining time, from the latest steps."""

from collections import deque

from mlm_train.monitor.report import StepReport

STEPS = 50  # averaged over


class TimeLeft:
    """Estimates the seconds until step `steps` is done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.recent: deque[float] = deque(maxlen=STEPS)

    def after(self, report: StepReport) -> float:
        """Seconds left after a step. Call it once for each step."""
        self.recent.append(report.seconds)
        return (self.steps - report.progress.step) * sum(self.recent) / len(self.recent)
