"""Reports of the training loop to callbacks: plain values without formatting."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from mlm_train.data.samples import Consumed


@dataclass(frozen=True)
class Rewarm:
    """A linear transition of the learning rate from one schedule to another.

    It starts at step `step` (0, 1, ...) with the rate `lr` and reaches the new schedule `steps` steps later.
    """

    step: int
    lr: float
    steps: int


@dataclass(frozen=True)
class Progress:
    """Progress of a run. `samples` is the global data cursor, independent of the layout.

    skipped: steps skipped because of a non-finite loss or gradient. rollbacks: returns to a checkpoint
    because of a loss spike. rewarm: the latest one, if any.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    rollbacks: int = 0
    rewarm: Rewarm | None = None

    def after(self, samples: int, sequence_length: int) -> "Progress":
        """The progress after one more step of `samples` sequences."""
        tokens = samples * sequence_length
        return replace(self, step=self.step + 1, samples=self.samples + samples, tokens=self.tokens + tokens)

    def as_dict(self) -> dict[str, Any]:
        """As a dict, for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """From a manifest, which may have other fields too, or lack some if it is old."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        if known.get("rewarm") is not None:
            known["rewarm"] = Rewarm(**known["rewarm"])
        return cls(**known)


class Step(Protocol):
    """The result of a step (train/step.py: StepResult)."""

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
    """One finished step. Seconds are wall time; `batch` is the global batch size, sequences.

    consumed: by source, the data consumed by the run so far.
    """

    progress: Progress
    lr: float
    batch: int
    result: Step
    data_seconds: float
    consumed: Mapping[str, Consumed]

    @property
    def seconds(self) -> float:
        """Seconds of the step, including the wait for its data."""
        return self.result.seconds


@dataclass(frozen=True)
class SkippedStep:
    """A step with a non-finite loss or gradient: weights are unchanged. reason: the value and its origin."""

    progress: Progress  # after the step
    reason: str


@dataclass(frozen=True)
class Rollback:
    """A rollback to a checkpoint because of a loss spike; the run continues with later samples."""

    progress: Progress  # at the spike
    back: Progress  # from which the run continues
    checkpoint: str  # name of its folder


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the fixed validation samples.

    by_source: loss and number of samples of each source. further: of each set of data.validation.
    """

    progress: Progress
    loss: float
    samples: int
    seconds: float
    by_source: Mapping[str, tuple[float, int]]
    further: Mapping[str, tuple[float, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    folder: Path
    seconds: float  # from the start of the copy to the commit
    stall: float  # seconds that training was blocked
