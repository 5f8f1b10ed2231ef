"""Config section `schedule`, and its checks against the optimizer and the run."""

from typing import Literal

from pydantic import Field

from mlm_train.config.section import Section, reject


class ScheduleConfig(Section):
    """The learning-rate schedule."""

    kind: Literal["cosine", "wsd"] = Field(
        "cosine", description="cosine, or wsd: warmup, stable, linear decay at the end"
    )
    total_steps: int | None = Field(
        None,
        ge=1,
        description="length of the schedule, steps from the first to the end of the decay; the rate stays at "
        "min_lr afterwards (default: train.steps)",
    )
    warmup_steps: int = Field(0, ge=0, description="linear warmup from 0, steps")
    decay_steps: int | None = Field(None, ge=1, description="wsd: length of the final decay, steps")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    rewarm_steps: int | None = Field(
        None,
        ge=0,
        description="when a run resumes under another schedule than its checkpoint's: steps over which the "
        "rate moves linearly from the old schedule to the new one; 0: at once. By default a jump of the rate "
        "is rejected",
    )


def check_schedule(schedule: ScheduleConfig, peak: float, steps: int) -> None:
    """Raise UserError for an impossible schedule or a field without effect.

    peak: optimizer.lr; steps: train.steps.
    """
    if schedule.min_lr > peak:
        reject("schedule.min_lr", schedule.min_lr, f"is above optimizer.lr={peak}")
    if schedule.kind == "cosine" and schedule.decay_steps is not None:
        reject("schedule.decay_steps", schedule.decay_steps, "has an effect only with schedule.kind=wsd")
    if schedule.kind == "wsd" and schedule.decay_steps is None:
        reject("schedule.decay_steps", None, "schedule.kind=wsd needs it: the steps of the final decay")
    total = schedule.total_steps or steps
    if schedule.warmup_steps + (schedule.decay_steps or 0) > total:
        given = f"train.steps={steps}" if schedule.total_steps is None else f"schedule.total_steps={total}"
        reject(
            "schedule.warmup_steps",
            schedule.warmup_steps,
            f"warmup and decay are longer than {given}",
        )
