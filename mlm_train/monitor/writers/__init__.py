"""Where a run's metrics go: TensorBoard, a file of JSON lines, Weights & Biases, or a class of one's own.

Metrics are scalars by tag and step, written on the leading rank alone. A run that is resumed, or rolled back
after a loss spike, goes on from an earlier step: what was written of that step and of later ones is void.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mlm_train.config import Config
from mlm_train.monitor.writers.jsonl import JsonLinesWriter
from mlm_train.monitor.writers.tensorboard import TensorBoardWriter
from mlm_train.monitor.writers.wandb import WandbWriter
from mlm_train.utils.extensions import find


class MetricsWriter(Protocol):
    """What takes metrics. Made as `Writer(config, first_step)`.

    first_step: the first step that this launch will do (1, 2, ...); earlier launches' metrics of it and of
    later steps are void.
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag, such as "train/loss"; they may be infinite or NaN. Steps come in order."""

    def purge(self, step: int) -> None:
        """The run goes on with `step` again: what was written of it and of later ones is void."""

    def close(self) -> None:
        """The end: flush."""


# Names of config field monitor.writers (config/choices.py lists them too).
WRITERS: dict[str, Callable[[Config, int], MetricsWriter]] = {
    "tensorboard": TensorBoardWriter,
    "jsonl": JsonLinesWriter,
    "wandb": WandbWriter,
}


class Writers:
    """The writers that a run has chosen (config field monitor.writers), as one; none until opened."""

    def __init__(self) -> None:
        self.open_ones: list[MetricsWriter] = []

    def open(self, config: Config, first_step: int) -> None:
        """On the leading rank. Raises UserError for one that cannot be had here."""
        for name in config.monitor.writers:
            self.open_ones.append(find("monitor.writers", name, WRITERS)(config, first_step))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """To each of them."""
        for writer in self.open_ones:
            writer.scalars(values, step)

    def purge(self, step: int) -> None:
        """In each of them."""
        for writer in self.open_ones:
            writer.purge(step)

    def close(self) -> None:
        """All of them, whatever one of them raises; the first such failure is raised after all."""
        each([writer.close for writer in self.open_ones])
        self.open_ones.clear()


def each(endings: Sequence[Callable[[], None]]) -> None:
    """Call all of them; then raise what the first one raised that failed.

    Not an ExitStack, which takes from a failure the one that it came after: what has ended the run.
    """
    failures = []
    for end in endings:
        try:
            end()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]


__all__ = [
    "WRITERS",
    "JsonLinesWriter",
    "MetricsWriter",
    "TensorBoardWriter",
    "WandbWriter",
    "Writers",
    "each",
]
