"""The memory source: where a block gets FFN-M's output from.

A block computes x + Attn(N(x)) [+ FFN_C(N_c(x))] + alpha_l * m_l and asks its source for m_l. Sources
that compute m_l train the model (memory/); a source that reads it from a table serves it (tol/).
So one forward does for both.
"""

from typing import Any, Protocol

from torch import Tensor


class MemoryReader(Protocol):
    """FFN-M's output for one micro-batch."""

    def __call__(self, layer: int) -> Tensor:
        """m_l, shape [batch, sequence, hidden], without alpha."""
        ...


class MemorySource(Protocol):
    """Makes a reader for each micro-batch."""

    def open(self, ids: Tensor, x0: Any) -> MemoryReader:
        """`ids` int64 [batch, sequence]; `x0` their embeddings [batch, sequence, hidden]: None for tables."""
        ...


class Positions:
    """Which positions of a micro-batch are on this process: all, but for sequence parallelism's.

    parallel/tensor/collectives.py has one that cuts them over ranks.
    """

    positions = 1  # processes they are cut over

    def whole(self, x: Tensor) -> Tensor:
        """x [..., positions here, hidden] -> all positions."""
        return x

    def mine(self, x: Tensor, dim: int) -> Tensor:
        """x with all positions along `dim` -> with those that are here."""
        return x
