"""Learning rate over steps, and global batch over samples."""

import math

from mlm_train.config import Config, TrainConfig


def learning_rate(config: Config, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then cosine or stable and linear decay to min_lr."""
    schedule, peak, steps = config.schedule, config.optimizer.lr, config.train.steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, steps - schedule.warmup_steps)
        share = min(1.0, (step - schedule.warmup_steps) / span)
        return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
    assert schedule.decay_steps is not None
    left = max(0, steps - step)
    return schedule.min_lr + (peak - schedule.min_lr) * min(1.0, left / schedule.decay_steps)


def global_batch_at(train: TrainConfig, samples: int) -> int:
    """Sequences of the next step after `samples` sequences (the ramp is Megatron-LM's)."""
    ramp = train.ramp
    if ramp is None or samples >= ramp.samples:
        return train.global_batch
    stages = (train.global_batch - ramp.start) // ramp.increment
    return ramp.start + ramp.increment * int(samples * stages / ramp.samples)
