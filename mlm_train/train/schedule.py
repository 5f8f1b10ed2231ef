"""Learning rate over steps, and global batch over samples."""

import math
from dataclasses import replace

from mlm_train.config import Config, TrainConfig, changed_fields
from mlm_train.errors import UserError
from mlm_train.monitor.report import Progress, Rewarm

ROUNDING = 1e-9  # relative


def learning_rate(config: Config, step: int, rewarm: Rewarm | None = None) -> float:
    """The rate of step 0, 1, ...: up to the end of the rewarm on its line, then the schedule's."""
    if rewarm is None or step >= rewarm.step + rewarm.steps:
        return _scheduled(config, step)
    goal = _scheduled(config, rewarm.step + rewarm.steps)
    gone = max(0, step - rewarm.step)  # a run may have been taken back to before it
    return rewarm.lr + (goal - rewarm.lr) * gone / rewarm.steps


def _scheduled(config: Config, step: int) -> float:
    """Linear warm-up, then cosine or stable and linear decay to min_lr."""
    schedule, peak, total = config.schedule, config.optimizer.lr, config.schedule_steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, total - schedule.warmup_steps)
        share = min(1.0, (step - schedule.warmup_steps) / span)
        return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
    assert schedule.decay_steps is not None
    left = max(0, total - step)
    return schedule.min_lr + (peak - schedule.min_lr) * min(1.0, left / schedule.decay_steps)


def go_on(progress: Progress, written: Config, config: Config) -> tuple[Progress, str | None]:
    """The progress of a checkpoint, with the rewarm under which a run goes on from it.

    written: the checkpoint's config. Also a line for the log, where the rate of the next step is not what it
    would have been. Raises UserError where that is nobody's wish: of the schedule's fields only optimizer.lr
    speaks for itself, the others need schedule.rewarm_steps.
    """
    step, steps = progress.step, config.schedule.rewarm_steps
    rewarm = None if steps == 0 else progress.rewarm
    before = learning_rate(written, step, progress.rewarm)
    after = learning_rate(config, step, rewarm)
    how = "at once"
    if math.isclose(before, after, rel_tol=ROUNDING):
        return replace(progress, rewarm=rewarm), None
    if steps is None:
        optimizer = written.optimizer.model_copy(update={"lr": config.optimizer.lr})
        wished = learning_rate(written.model_copy(update={"optimizer": optimizer}), step, rewarm)
        if not math.isclose(wished, after, rel_tol=ROUNDING):
            raise UserError(_refusal(step, before, after, written, config))
    elif steps:
        rewarm = Rewarm(step, before, steps)
        after, how = learning_rate(config, step + steps), f"in a straight line over {steps} steps"
    line = f"learning rate from step {step + 1} on: {before:.3g} to {after:.3g}, {how}"
    return replace(progress, rewarm=rewarm), line


def _refusal(step: int, before: float, after: float, written: Config, config: Config) -> str:
    """What has changed, and the ways out."""
    old, new = written.schedule_steps, config.schedule_steps
    fields = {
        field: values
        for field, values in changed_fields(written, config).items()
        if field == "optimizer.lr" or (field.startswith("schedule.") and "rewarm" not in field)
    }
    fields.pop("schedule.total_steps", None)
    held = [
        f"{field}={'null' if value is None else value}"
        for field, (value, _) in fields.items()
        if field != "optimizer.lr"
    ]
    if old != new:
        given = "train.steps" if config.schedule.total_steps is None else "schedule.total_steps"
        fields[given] = (old, new)
        held.append(f"schedule.total_steps={old}")
    changes = ", ".join(f"{field} {was} -> {value}" for field, (was, value) in fields.items())
    nothing = " (the rate is 0 there: nothing would be learnt)" if before == 0 else ""
    return (
        f"the learning rate of step {step + 1} would jump from {before:.3g} to {after:.3g} ({changes}): keep "
        f"the checkpoint's schedule by {' '.join(held)}{nothing}, or go to the new one by "
        "schedule.rewarm_steps=N, in a straight line over N steps (0: at once)"
    )


def global_batch_at(train: TrainConfig, samples: int) -> int:
    """Sequences of the next step after `samples` sequences (the warm-up is Megatron-LM's)."""
    warmup = train.batch_size_warmup
    if warmup is None or samples >= warmup.samples:
        return train.global_batch_size
    stages = (train.global_batch_size - warmup.start) // warmup.increment
    return warmup.start + warmup.increment * int(samples * stages / warmup.samples)
