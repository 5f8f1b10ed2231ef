"""What a finished step means for the run: go on, end, or go back to an older checkpoint."""

import statistics
from collections import deque
from dataclasses import replace

from mlm_train.checkpoint.load import load_training_state
from mlm_train.config import Config
from mlm_train.config.schema import SpikeConfig
from mlm_train.errors import SharedUserError
from mlm_train.monitor.report import Progress, Rollback
from mlm_train.train.preflight import newest_of
from mlm_train.train.setup import Run
from mlm_train.train.step import StepResult


class LossGuard:
    """Judges steps by what all ranks know alike, so all of them judge alike."""

    def __init__(self, config: Config) -> None:
        self.limit, self.spike = config.train.max_skipped_steps, config.train.spike
        self.in_row = 0
        self.usual: deque[float] = deque(maxlen=self.spike.window if self.spike else 0)

    def refuse_divergence(self, progress: Progress, result: StepResult) -> None:
        """End the run where too many steps in a row have changed nothing. Raises UserError."""
        self.in_row = self.in_row + 1 if result.fault is not None else 0
        if self.in_row >= self.limit:
            raise SharedUserError(
                f"{self.in_row} steps in a row, up to step {progress.step}, have diverged and were skipped "
                f"({result.fault}); committed checkpoints are kept: lower optimizer.lr or lengthen "
                "schedule.warmup_steps where it is no fault of a machine, and start again"
            )

    def sees_spike(self, result: StepResult) -> bool:
        """Whether a loss lies far above the ones before it (config section train.spike)."""
        if self.spike is None or result.fault is not None:
            return False
        if len(self.usual) == self.spike.window and result.loss > self._ceiling(self.spike):
            self.usual.clear()  # what is usual is found again from where the run goes on
            return True
        self.usual.append(result.loss)
        return False

    def _ceiling(self, spike: SpikeConfig) -> float:
        return statistics.fmean(self.usual) + spike.sigmas * statistics.stdev(self.usual)


def roll_back(run: Run, progress: Progress) -> Progress | None:
    """Go back to the newest checkpoint and on with later samples; None where there is no checkpoint.

    Every rank calls it. The weights that stay never see the samples up to the spike, and
    `train.spike.skip_steps` steps' worth after it. Raises UserError where the run has gone back too often.
    """
    spike = run.config.train.spike
    assert spike is not None
    if progress.rollbacks >= spike.max_rollbacks:
        raise SharedUserError(
            f"loss spike at step {progress.step} after {progress.rollbacks} rollbacks "
            f"(train.spike.max_rollbacks={spike.max_rollbacks}); committed checkpoints are kept: "
            "lower optimizer.lr, or look at the data there (mlm-train data inspect)"
        )
    run.runtime.marker.enter(f"rollback after step {progress.step}", patient=True)
    run.saver.settle()
    found = run.runtime.broadcast(lambda: newest_of(run.config))
    if found is None:
        run.log.say(f"loss spike at step {progress.step}, but no checkpoint to go back to; training goes on")
        return None
    for line in run.runtime.broadcast(found.set_damaged_aside):
        run.log.say(line)
    load_training_state(found.folder, found.manifest, run.trainer.engine)
    back = replace(
        found.progress,
        samples=progress.samples + spike.skip_steps * run.config.train.global_batch_size,
        skipped=progress.skipped,
        rollbacks=progress.rollbacks + 1,
        rewarm=progress.rewarm,
    )
    run.callbacks.on_fault(Rollback(progress, back, found.folder.name))
    return back
