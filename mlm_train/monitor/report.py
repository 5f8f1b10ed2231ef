"""What the loop tells the monitor: plain values, no formatting."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Progress:
    """How far a run is. `samples` is the global data cursor, whatever the layout was."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, samples: int, tokens: int) -> "Progress":
        """The progress one step later."""
        return Progress(self.step + 1, self.samples + samples, self.tokens + tokens)

    def as_dict(self) -> dict[str, int]:
        """For a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """From a manifest."""
        return cls(values["step"], values["samples"], values["tokens"])


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
    def table_rows(self) -> float: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True)
class StepReport:
    """One finished step. Seconds are wall time; `batch` counts sequences."""

    progress: Progress
    lr: float
    batch: int
    result: Step
    data_seconds: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on the fixed validation samples."""

    progress: Progress
    loss: float
    samples: int
    seconds: float
