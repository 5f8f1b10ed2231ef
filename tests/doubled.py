"""A memory mode with a wrong gradient, which the test that docs/extending.md recommends must find."""

from torch import Tensor

from mlm_train.model.source import MemoryReader
from tests.extensions import RowByRow


class Doubled(RowByRow):
    """Correct outputs, and twice the gradient."""

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """As RowByRow, but the gradient counts twice."""
        right = super().open(ids, x0)

        def read(layer: int) -> Tensor:
            return 2 * right(layer) - right(layer).detach()

        return read
