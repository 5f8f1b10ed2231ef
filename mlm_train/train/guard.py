"""Decide after a step: continue, end the run, or roll back to an older checkpoint."""

import statistics
from collections import deque
from dataclasses import replace
from functools import partial

from mlm_train.checkpoint.load import load_training_state
from mlm_train.config import Config
from mlm_train.config.schema import SpikeConfig
from mlm_train.errors import SharedUserError
from mlm_train.monitor.report import Progress, Rollback
from mlm_train.train.preflight import newest_of
from mlm_train.train.resume import intact_checkpoint
from mlm_train.train.setup import Run
from mlm_train.train.step import StepResult


class LossGuard:
    """Judges steps by values that are equal on all ranks, so that all ranks decide alike."""

    def __init__(self, config: Config) -> None:
        self.limit, self.spike = config.train.max_skipped_steps, config.train.spike
        self.skipped_in_row = 0
        self.recent_losses: deque[float] = deque(maxlen=self.spike.window if self.spike else 0)

    def refuse_divergence(self, progress: Progress, result: StepResult) -> None:
        """Raise UserError once train.max_skipped_steps consecutive steps were skipped."""
        self.skipped_in_row = self.skipped_in_row + 1 if result.fault is not None else 0
        if self.skipped_in_row >= self.limit:
            raise SharedUserError(
                f"{self.skipped_in_row} steps in a row, up to step {progress.step}, diverged and were "
                f"skipped ({result.fault}); committed checkpoints are kept: unless a machine is at fault, "
                "lower optimizer.lr or raise schedule.warmup_steps, then restart"
            )

    def sees_spike(self, result: StepResult) -> bool:
        """Whether the loss lies far above the recent ones (config section train.spike)."""
        if self.spike is None or result.fault is not None:
            return False
        if len(self.recent_losses) == self.spike.window and result.loss > self._ceiling(self.spike):
            self.recent_losses.clear()  # the window fills anew after the rollback
            return True
        self.recent_losses.append(result.loss)
        return False

    def _ceiling(self, spike: SpikeConfig) -> float:
        return statistics.fmean(self.recent_losses) + spike.sigmas * statistics.stdev(self.recent_losses)


def roll_back(run: Run, progress: Progress) -> Progress | None:
    """Load the newest checkpoint and continue with later samples; None if there is no checkpoint.

    Every rank calls it. Samples between the checkpoint and the spike, and `train.spike.skip_steps` steps'
    worth after it, are skipped. Raises UserError after train.spike.max_rollbacks rollbacks.
    """
    spike = run.config.train.spike
    assert spike is not None
    if progress.rollbacks >= spike.max_rollbacks:
        raise SharedUserError(
            f"loss spike at step {progress.step} after {progress.rollbacks} rollbacks "
            f"(train.spike.max_rollbacks={spike.max_rollbacks}); committed checkpoints are kept: "
            "lower optimizer.lr, or inspect the data there (mlm-train data inspect)"
        )
    run.runtime.marker.enter(f"rollback after step {progress.step}", patient=True)
    run.saver.settle()
    newest = intact_checkpoint(run.config, run.runtime, partial(newest_of, run.config))
    if newest is None:
        run.log.say(
            f"loss spike at step {progress.step}, but no checkpoint to roll back to; training continues"
        )
        return None
    for line in run.runtime.broadcast(newest.set_damaged_aside):
        run.log.say(line)
    load_training_state(newest.folder, newest.manifest, run.trainer.engine, run.runtime)
    back = replace(
        newest.progress,
        samples=progress.samples + spike.skip_steps * run.config.train.global_batch_size,
        skipped=progress.skipped,
        rollbacks=progress.rollbacks + 1,
        rewarm=progress.rewarm,
    )
    run.callbacks.on_fault(Rollback(progress, back, newest.folder.name))
    return back
