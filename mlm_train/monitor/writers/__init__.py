"""Metrics writers: TensorBoard, JSON lines, Weights & Biases, or a user's class.

Metrics are scalars by tag and step, written on rank 0 only. A run that is resumed, or rolled back after a
loss spike, continues from an earlier step: metrics written before of that step and later ones are void.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mlm_train.config import Config
from mlm_train.monitor.writers.jsonl import JsonLinesWriter
from mlm_train.monitor.writers.tensorboard import TensorBoardWriter
from mlm_train.monitor.writers.wandb import WandbWriter
from mlm_train.utils.extensions import find


class MetricsWriter(Protocol):
    """Writes metrics. Created as `Writer(config, first_step)`.

    first_step: the first step of this launch (1, 2, ...); metrics of it and later steps written by earlier
    launches are void.
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values by tag, such as "train/loss"; they may be infinite or NaN. Steps come in order."""

    def purge(self, step: int) -> None:
        """The run repeats `step`: metrics of it and later steps are void."""

    def close(self) -> None:
        """Flush and close."""


# Names in config field monitor.writers (also listed in config/choices.py).
WRITERS: dict[str, Callable[[Config, int], MetricsWriter]] = {
    "tensorboard": TensorBoardWriter,
    "jsonl": JsonLinesWriter,
    "wandb": WandbWriter,
}


class Writers:
    """The writers of config field monitor.writers, as one; none until opened."""

    def __init__(self) -> None:
        self.writers: list[MetricsWriter] = []

    def open(self, config: Config, first_step: int) -> None:
        """Open them, on rank 0. Raises UserError for one that is not available."""
        for name in config.monitor.writers:
            self.writers.append(find("monitor.writers", name, WRITERS)(config, first_step))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write to each of them."""
        for writer in self.writers:
            writer.scalars(values, step)

    def purge(self, step: int) -> None:
        """Purge each of them."""
        for writer in self.writers:
            writer.purge(step)

    def close(self) -> None:
        """Close all of them, even if some raise; then raise the first exception."""
        each([writer.close for writer in self.writers])
        self.writers.clear()


def each(calls: Sequence[Callable[[], None]]) -> None:
    """Call all of them, even if some raise; then raise the first exception.

    An ExitStack would replace an exception's context, which tells what ended the run.
    """
    failures = []
    for call in calls:
        try:
            call()
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
