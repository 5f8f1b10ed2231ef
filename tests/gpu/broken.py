"""A check of code that is broken on purpose: the suite must report it (test_runner.py)."""

from unittest.mock import patch

from torch import Tensor

from tests.gpu import kernels
from tests.gpu.checks import Figures


def rows(device: str) -> Figures:
    """The check of rows, while their sums leave out the last position."""

    def add_rows(table: Tensor, index: Tensor, values: Tensor) -> None:
        table.index_add_(0, index[:-1], values[:-1])

    with patch("mlm_train.memory.rows.add_rows", add_rows):
        return kernels.rows(device)
