"""The training loop. Logs and metrics are callbacks (monitor/callback.py)."""

import time
from dataclasses import replace

from mlm_train.checkpoint.manifest import Validation
from mlm_train.monitor.report import Progress
from mlm_train.train.batches import Key, MicroBatch, Prefetcher, pinned, step_batches
from mlm_train.train.results import Launch, Results
from mlm_train.train.schedule import global_batch_at, learning_rate
from mlm_train.train.setup import Run
from mlm_train.train.signals import EXIT_CODE
from mlm_train.train.validation import validate


def train(run: Run) -> int:
    """Train up to train.steps (or stop_after), with validations and checkpoints.

    Returns the exit code: 0, or that of a signal that ended the run early, after a checkpoint.
    """
    config, progress, marker = run.config, run.progress, run.runtime.marker
    first = progress.step
    last = min(config.train.steps, progress.step + (config.train.stop_after or config.train.steps))
    micro_batch, runtime, results = config.train.micro_batch_size, run.runtime, Results(run)

    def read(key: Key) -> tuple[list[MicroBatch], float]:
        started = time.perf_counter()
        batches = pinned(step_batches(run.samples, *key, micro_batch, runtime.topology), runtime.device)
        seconds = time.perf_counter() - started
        run.trainer.executor.plan_ahead(batches)  # waits for other ranks
        return batches, seconds

    data = Prefetcher(read)
    while progress.step < last:
        marker.enter(f"step {progress.step + 1}", patient=progress.step == first)
        run.callbacks.before_step(progress)
        marker.at("data")
        started = time.perf_counter()
        size = global_batch_at(config.train, progress.samples)
        following = progress.samples + size
        then = (following, global_batch_at(config.train, following))
        batches, reading = data.take((progress.samples, size), then if progress.step + 1 < last else None)
        data_seconds = time.perf_counter() - started
        lr = learning_rate(config, progress.step, progress.rewarm)
        step = run.trainer.launch(batches, lr, data_seconds, reading)
        progress = progress.after(size, config.data.sequence_length)
        results.add(Launch(step, progress, lr, size, data_seconds))
        validates = _due(progress.step, config.train.eval_interval, config.train.steps)
        saves = _due(progress.step, config.checkpoint.interval, last)
        if (earlier := results.read(all_steps=validates or saves)) is not None:
            progress = earlier
            continue
        progress = replace(progress, skipped=results.skipped)
        validation = validate(run, progress) if validates else None
        # Nothing is saved after a skipped step: the cause may lie in the weights.
        if results.asked or progress.step == last or (saves and results.sound):
            save(run, progress, validation)
        run.saver.poll()
        if results.asked and progress.step < last:
            run.saver.finish()
            data.drain()
            run.log.say(
                f"stopped by {results.asked.name} after step {progress.step}; the same command resumes"
            )
            return EXIT_CODE[results.asked]
    run.saver.finish()
    return 0


def _due(step: int, interval: int, last: int) -> bool:
    """Whether a step is a multiple of `interval` (0: never) or the last one."""
    return step == last or (interval > 0 and step % interval == 0)


def save(run: Run, progress: Progress, validation: Validation | None = None) -> None:
    """Start a checkpoint, logged once it is on disk. validation: the result at this step, if any."""
    run.runtime.marker.enter(f"checkpoint of step {progress.step}", patient=True)
    run.saver.save(progress.as_dict(), validation)
