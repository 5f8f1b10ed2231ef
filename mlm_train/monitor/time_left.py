"""How long a run still takes, by its latest steps."""

from collections import deque

from mlm_train.monitor.report import StepReport

STEPS = 50  # looked back on


class TimeLeft:
    """Seconds to the last of `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.recent: deque[float] = deque(maxlen=STEPS)

    def after(self, report: StepReport) -> float:
        """Once for each step."""
        self.recent.append(report.seconds)
        return (self.steps - report.progress.step) * sum(self.recent) / len(self.recent)
