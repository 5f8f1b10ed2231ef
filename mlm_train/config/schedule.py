"""Config section `schedule`, and what it asks of the optimizer and the run."""

from typing import Literal

from pydantic import Field

from mlm_train.config.section import Section, blame


class ScheduleConfig(Section):
    """The learning rate over steps."""

    kind: Literal["cosine", "wsd"] = Field(
        "cosine", description="cosine, or wsd: warm-up, stable, linear decay at the end"
    )
    total_steps: int | None = Field(
        None,
        ge=1,
        description="steps from the first to the end of the decay; the rate stays at min_lr after them "
        "(default: train.steps)",
    )
    warmup_steps: int = Field(0, ge=0, description="linear warm-up from 0, steps")
    decay_steps: int | None = Field(None, ge=1, description="wsd: length of the last decay, steps")
    min_lr: float = Field(0.0, ge=0, description="learning rate after the last step")
    rewarm_steps: int | None = Field(
        None,
        ge=0,
        description="where a run goes on under another schedule than its checkpoint's: steps over which the "
        "rate goes in a straight line from the old schedule's to the new one's; 0: at once. By default a "
        "rate that would jump is refused",
    )


def check_schedule(schedule: ScheduleConfig, peak: float, steps: int) -> None:
    """Refuse what cannot be, or has no effect. peak: optimizer.lr; steps: train.steps."""
    if schedule.min_lr > peak:
        blame("schedule.min_lr", schedule.min_lr, f"is above optimizer.lr={peak}")
    if schedule.kind == "cosine" and schedule.decay_steps is not None:
        blame("schedule.decay_steps", schedule.decay_steps, "has an effect only with schedule.kind=wsd")
    if schedule.kind == "wsd" and schedule.decay_steps is None:
        blame("schedule.decay_steps", None, "schedule.kind=wsd needs it: the steps of the last decay")
    total = schedule.total_steps or steps
    if schedule.warmup_steps + (schedule.decay_steps or 0) > total:
        given = f"train.steps={steps}" if schedule.total_steps is None else f"schedule.total_steps={total}"
        blame(
            "schedule.warmup_steps",
            schedule.warmup_steps,
            f"warm-up and decay are longer than {given}",
        )
