"""The main loop: what is seen of a run is made of callbacks (monitor/callback.py)."""

import math
import time

from mlm_train.checkpoint.manifest import Validation
from mlm_train.monitor.report import Evaluation, Progress, SkippedStep, StepReport
from mlm_train.train.batches import Prefetcher, evaluation_batches, pinned, step_batches
from mlm_train.train.guard import LossGuard, roll_back
from mlm_train.train.schedule import global_batch_at, learning_rate
from mlm_train.train.setup import Run
from mlm_train.train.signals import EXIT_CODE


def train(run: Run) -> int:
    """Train to train.steps (or stop_after), evaluating and saving on the way.

    Returns the exit code: 0, or that of a signal which ended the run early, after a checkpoint.
    """
    config, progress, marker = run.config, run.progress, run.runtime.marker
    first = progress.step
    last = min(config.train.steps, progress.step + (config.train.stop_after or config.train.steps))
    micro_batch, runtime, guard = config.train.micro_batch_size, run.runtime, LossGuard(config)
    callbacks = run.callbacks
    data = Prefetcher(
        lambda key: pinned(step_batches(run.samples, *key, micro_batch, runtime.topology), runtime.device)
    )
    while progress.step < last:
        marker.enter(f"step {progress.step + 1}", patient=progress.step == first)
        callbacks.before_step(progress)
        marker.at("data")
        started = time.perf_counter()
        size = global_batch_at(config.train, progress.samples)
        following = progress.samples + size
        then = (following, global_batch_at(config.train, following))
        batches = data.take((progress.samples, size), then if progress.step + 1 < last else None)
        data_seconds = time.perf_counter() - started
        lr = learning_rate(config, progress.step, progress.rewarm)
        result = run.trainer.step(batches, lr, data_seconds)
        progress = progress.after(size, result.tokens, result.fault is not None)
        if result.fault is not None:
            callbacks.on_fault(SkippedStep(progress, result.fault))
        callbacks.after_step(StepReport(progress, lr, size, result, data_seconds, run.consumed(progress)))
        guard.refuse_divergence(progress, result)
        if guard.sees_spike(result) and (earlier := roll_back(run, progress)) is not None:
            progress = earlier
            continue
        validation = None
        if _due(progress.step, config.train.eval_interval, config.train.steps):
            validation = evaluate(run, progress)
        # After a skipped step the newest checkpoint stays: what spoils the steps may be in the weights.
        every = config.checkpoint.interval if result.fault is None else 0
        if result.asked or _due(progress.step, every, last):
            save(run, progress, validation)
        run.saver.poll()
        if result.asked and progress.step < last:
            run.saver.finish()
            run.log.say(
                f"stopped by {result.asked.name} after step {progress.step}; the same command resumes"
            )
            return EXIT_CODE[result.asked]
    run.saver.finish()
    return 0


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and at the last one."""
    return step == last or (every > 0 and step % every == 0)


def evaluate(run: Run, progress: Progress) -> Validation | None:
    """Loss on the fixed validation samples, on every rank, told to callbacks; None where not finite."""
    run.runtime.marker.enter(f"validation after step {progress.step}")
    run.callbacks.before_evaluation(progress)
    started = time.perf_counter()
    train = run.config.train
    count = min(train.eval_samples, run.validation.samples_per_epoch)
    batches, sources = evaluation_batches(run.validation, count, train.micro_batch_size, run.runtime.topology)
    names = run.data.names
    loss, losses = run.trainer.evaluate_by_source(batches, sources, len(names))
    numbers = [taken.samples for taken in run.validation.consumed(count)]
    by_source = {
        name: (mean, number) for name, mean, number in zip(names, losses, numbers, strict=True) if number
    }
    seconds = time.perf_counter() - started
    run.callbacks.after_evaluation(Evaluation(progress, loss, count, seconds, by_source))
    return Validation(loss=loss, samples=count) if math.isfinite(loss) else None


def save(run: Run, progress: Progress, validation: Validation | None = None) -> None:
    """Begin a checkpoint; said only once it is on disk. validation: of this step, where it had one."""
    run.runtime.marker.enter(f"checkpoint of step {progress.step}", patient=True)
    run.saver.save(progress.as_dict(), validation)
