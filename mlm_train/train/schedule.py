"""Learning rate by step, and global batch size by samples."""

import math
from dataclasses import replace

from mlm_train.config import Config, TrainConfig, changed_fields
from mlm_train.errors import UserError
from mlm_train.monitor.report import Progress, Rewarm

ROUNDING = 1e-9  # relative


def learning_rate(config: Config, step: int, rewarm: Rewarm | None = None) -> float:
    """The learning rate of step 0, 1, ...: linear during the rewarm, then the schedule's."""
    if rewarm is None or step >= rewarm.step + rewarm.steps:
        return _scheduled(config, step)
    goal = _scheduled(config, rewarm.step + rewarm.steps)
    done = max(0, step - rewarm.step)  # negative after a rollback to before the rewarm
    return rewarm.lr + (goal - rewarm.lr) * done / rewarm.steps


def _scheduled(config: Config, step: int) -> float:
    """Linear warmup, then cosine, or stable and linear decay, to min_lr."""
    schedule, peak, total = config.schedule, config.optimizer.lr, config.schedule_steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, total - schedule.warmup_steps)
        fraction = min(1.0, (step - schedule.warmup_steps) / span)
        return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * fraction))
    assert schedule.decay_steps is not None
    left = max(0, total - step)
    return schedule.min_lr + (peak - schedule.min_lr) * min(1.0, left / schedule.decay_steps)


def resumed_progress(progress: Progress, written: Config, config: Config) -> tuple[Progress, str | None]:
    """The progress of a checkpoint with the rewarm of the resumed run, and a log line if the rate changes.

    written: the checkpoint's config. The line is None if the next step's rate is what it would have been.
    Raises UserError if the rate would jump by accident: a new optimizer.lr is intended, a change of other
    schedule fields needs schedule.rewarm_steps.
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
        intended = learning_rate(written.model_copy(update={"optimizer": optimizer}), step, rewarm)
        if not math.isclose(intended, after, rel_tol=ROUNDING):
            raise UserError(_jump_error(step, before, after, written, config))
    elif steps:
        rewarm = Rewarm(step, before, steps)
        after, how = learning_rate(config, step + steps), f"linearly over {steps} steps"
    line = f"learning rate from step {step + 1} on: {before:.3g} to {after:.3g}, {how}"
    return replace(progress, rewarm=rewarm), line


def _jump_error(step: int, before: float, after: float, written: Config, config: Config) -> str:
    """The error message: what changed, and how to resolve it."""
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
    nothing = " (its rate is 0 there: nothing would be learned)" if before == 0 else ""
    return (
        f"the learning rate of step {step + 1} would jump from {before:.3g} to {after:.3g} ({changes}): keep "
        f"the checkpoint's schedule with {' '.join(held)}{nothing}, or move to the new one with "
        "schedule.rewarm_steps=N, linearly over N steps (0: at once)"
    )


def global_batch_at(train: TrainConfig, samples: int) -> int:
    """Global batch size of the next step after `samples` sequences (batch size warmup as in Megatron-LM)."""
    warmup = train.batch_size_warmup
    if warmup is None or samples >= warmup.samples:
        return train.global_batch_size
    stages = (train.global_batch_size - warmup.start) // warmup.increment
    return warmup.start + warmup.increment * int(samples * stages / warmup.samples)
