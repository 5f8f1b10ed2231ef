"""Validation during training: the loss of each source, and of each further set, on fixed samples."""

import math
import time

from mlm_train.checkpoint.manifest import Validation
from mlm_train.data.samples import Samples
from mlm_train.monitor.report import Evaluation, Progress
from mlm_train.train.batches import evaluation_batches
from mlm_train.train.setup import Run

Losses = dict[str, tuple[float, int]]  # name -> mean loss, number of samples


def validate(run: Run, progress: Progress) -> Validation | None:
    """Validate on the fixed samples and notify callbacks, on every rank; None if the loss is non-finite.

    The result, by which checkpoints are kept, is of the training data's own validation splits alone.
    """
    marker = run.runtime.marker
    marker.enter(f"validation after step {progress.step}")
    run.callbacks.before_evaluation(progress)
    started = time.perf_counter()
    loss, count, by_source = _losses(run, run.validation, run.data.names)
    further: Losses = {}
    for name, samples in run.further_validation.items():
        marker.enter(f"validation on {name} after step {progress.step}")
        further |= _losses(run, samples, [name])[2]
    seconds = time.perf_counter() - started
    run.callbacks.after_evaluation(Evaluation(progress, loss, count, seconds, by_source, further))
    return Validation(loss=loss, samples=count) if math.isfinite(loss) else None


def _losses(run: Run, samples: Samples, names: list[str]) -> tuple[float, int, Losses]:
    """The mean loss over train.eval_samples samples, their number, and both of each source that has some."""
    train = run.config.train
    count = min(train.eval_samples, samples.samples_per_epoch)
    batches, sources = evaluation_batches(samples, count, train.micro_batch_size, run.runtime.topology)
    loss, losses = run.trainer.evaluate_by_source(batches, sources, len(names))
    sizes = [consumed.samples for consumed in samples.consumed(count)]
    by_source = {name: (mean, size) for name, mean, size in zip(names, losses, sizes, strict=True) if size}
    return loss, count, by_source
