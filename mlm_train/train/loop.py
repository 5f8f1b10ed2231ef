"""The main loop."""

import math
import time
from pathlib import Path

from mlm_train.checkpoint.save import save_checkpoint
from mlm_train.errors import SharedUserError
from mlm_train.monitor.report import Evaluation, Progress, StepReport
from mlm_train.train.batches import Ahead, evaluation_batches, pinned, step_batches
from mlm_train.train.schedule import global_batch_at, learning_rate
from mlm_train.train.setup import Run
from mlm_train.train.step import StepResult


def train(run: Run) -> Progress:
    """Train to train.steps (or stop_after), evaluating and saving on the way. Returns the last state."""
    config, progress, place = run.config, run.progress, run.runtime.place
    first = progress.step
    last = min(config.train.steps, progress.step + (config.train.stop_after or config.train.steps))
    micro_batch, runtime = config.train.micro_batch, run.runtime
    data = Ahead(
        lambda key: pinned(step_batches(run.samples, *key, micro_batch, runtime.topology), runtime.device)
    )
    while progress.step < last:
        place.enter(f"step {progress.step + 1}", patient=progress.step == first)
        place.at("data")
        started = time.perf_counter()
        size = global_batch_at(config.train, progress.samples)
        following = progress.samples + size
        then = (following, global_batch_at(config.train, following))
        batches = data.take((progress.samples, size), then if progress.step + 1 < last else None)
        data_seconds = time.perf_counter() - started
        lr = learning_rate(config, progress.step)
        result = run.trainer.step(batches, lr)
        progress = progress.after(size, result.tokens)
        run.monitor.step(StepReport(progress, lr, size, result, data_seconds))
        _refuse_divergence(progress.step, result)
        if _due(progress.step, config.train.evaluate_every, config.train.steps):
            evaluate(run, progress)
        if _due(progress.step, config.checkpoint.every, last):
            save(run, progress)
    return progress


def _refuse_divergence(step: int, result: StepResult) -> None:
    """End before anything of a diverged step is saved; the committed checkpoints stay."""
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise SharedUserError(
            f"step {step} diverged (loss {result.loss}, gradient norm {result.grad_norm}); committed "
            "checkpoints are kept: lower optimizer.lr or lengthen schedule.warmup_steps, and start again"
        )


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and at the last one."""
    return step == last or (every > 0 and step % every == 0)


def evaluate(run: Run, progress: Progress) -> float:
    """Loss on the fixed validation samples, on every rank; told to the monitor."""
    started = time.perf_counter()
    run.runtime.place.enter(f"validation after step {progress.step}")
    train = run.config.train
    count = min(train.evaluate_samples, run.validation.samples_per_epoch)
    batches = evaluation_batches(run.validation, count, train.micro_batch, run.runtime.topology)
    loss = run.trainer.evaluate(batches)
    run.monitor.evaluation(Evaluation(progress, loss, count, time.perf_counter() - started))
    return loss


def save(run: Run, progress: Progress) -> None:
    """Commit a checkpoint; said only once it is on disk."""
    started = time.perf_counter()
    run.runtime.place.enter(f"checkpoint of step {progress.step}", patient=True)
    root = Path(run.config.train.output) / "checkpoints"
    data = {"fingerprint": run.data.fingerprint, "eod_id": run.data.eod_id}
    folder = save_checkpoint(root, run.trainer.engine, run.runtime, run.config, progress.as_dict(), data)
    run.monitor.committed(folder, time.perf_counter() - started)
