"""A table's counters in TensorBoard, batch by batch."""

from dataclasses import replace
from pathlib import Path

from mlm_train.monitor.writers.tensorboard import EventFiles
from mlm_train.tol.serve.store import Counters
from mlm_train.utils.files import writing


class CounterEvents:
    """Writes what a store counted in each batch as scalars `tol/rows`, `tol/hit_rate` and so on.

    Batches are steps 1, 2, ... UserError where the folder cannot be written.
    """

    def __init__(self, counters: Counters, folder: Path) -> None:
        with writing(folder):
            self._files = EventFiles(folder, first_step=1)
        self._counters, self._before, self._batch = counters, replace(counters), 0

    def after_batch(self) -> None:
        """A batch has ended."""
        batch, self._before = self._counters.since(self._before), replace(self._counters)
        self._batch += 1
        values = {f"tol/{name}": value for name, value in batch.by_name().items()}
        self._files.scalars(values | {"tol/hit_rate": batch.hit_rate}, self._batch)

    def close(self) -> None:
        """Close the file."""
        self._files.close()
