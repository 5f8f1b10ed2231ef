"""What the loop tells callbacks: plain values, no formatting."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from mlm_train.data.samples import Consumed


@dataclass(frozen=True)
class Rewarm:
    """A straight line of the learning rate from one schedule to another, over `steps` steps.

    It begins with step `step` (0, 1, ...) at the rate `lr`, and ends where the schedule is `steps` later.
    """

    step: int
    lr: float
    steps: int


@dataclass(frozen=True)
class Progress:
    """How far a run is. `samples` is the global data cursor, whatever the layout was.

    skipped: steps that changed nothing, because a loss or gradient was not finite. rollbacks: returns to an
    older checkpoint because of a loss spike. rewarm: the latest one, if there was any.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    rollbacks: int = 0
    rewarm: Rewarm | None = None

    def after(self, samples: int, tokens: int, skipped: bool = False) -> "Progress":
        """The progress one step later."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            skipped=self.skipped + skipped,
        )

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """From a manifest, which knows more, or of an older version less."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        if known.get("rewarm") is not None:
            known["rewarm"] = Rewarm(**known["rewarm"])
        return cls(**known)


class Step(Protocol):
    """What a step did (train/step.py: StepResult)."""

    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def distinct_micro(self) -> float: ...
    @property
    def distinct_step(self) -> float: ...
    @property
    def ffn_m_evaluations(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def waited(self) -> Sequence[float]: ...
    @property
    def forward(self) -> Sequence[float]: ...
    @property
    def peak_memory(self) -> Sequence[float]: ...
    @property
    def fault(self) -> str | None: ...


@dataclass(frozen=True)
class StepReport:
    """One finished step. Seconds are wall time; `batch` counts sequences.

    consumed: by source, what the run has taken so far.
    """

    progress: Progress
    lr: float
    batch: int
    result: Step
    data_seconds: float
    consumed: Mapping[str, Consumed]

    @property
    def seconds(self) -> float:
        """Of the whole step, the wait for its data included."""
        return self.result.seconds + self.data_seconds


@dataclass(frozen=True)
class SkippedStep:
    """A step whose loss or gradient was not finite: it has changed nothing. reason: what, and where."""

    progress: Progress  # after the step
    reason: str


@dataclass(frozen=True)
class Rollback:
    """A loss spike took the run back to a checkpoint, and on with later samples."""

    progress: Progress  # at the spike
    back: Progress  # where the run goes on
    checkpoint: str  # name of its folder


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the fixed validation samples. by_source: loss and samples of each that has some."""

    progress: Progress
    loss: float
    samples: int
    seconds: float
    by_source: Mapping[str, tuple[float, int]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    folder: Path
    seconds: float  # from the beginning of the copy to the commit
    stall: float  # how long training stood still for it
