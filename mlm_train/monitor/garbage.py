"""Python's garbage collection at fixed steps, at the same time on all ranks."""

import gc

from mlm_train.monitor.callback import Callback
from mlm_train.monitor.report import Progress, StepReport


class GarbageCollection(Callback):
    """Collects garbage every train.gc_interval steps instead of whenever Python sees fit.

    A collection takes milliseconds, and all ranks wait for the one that collects: together they wait once.
    """

    def on_train_start(self, progress: Progress) -> None:
        """Take over from Python."""
        if self.config.train.gc_interval:
            gc.collect()
            gc.disable()

    def after_step(self, report: StepReport) -> None:
        """Collect young objects; old ones are few, and Python looks at them at the end."""
        interval = self.config.train.gc_interval
        if interval and report.progress.step % interval == 0:
            gc.collect(1)

    def on_train_end(self) -> None:
        """Give back to Python."""
        gc.enable()
