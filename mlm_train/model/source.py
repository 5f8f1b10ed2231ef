"""The memory source: where a block gets FFN-M's output from.

A block computes x + Attn(N(x)) [+ FFN_C(N_c(x))] + alpha_l * m_l and gets m_l from its source. In training
sources compute m_l (memory/); in inference a source reads it from a table (tol/). One forward serves both.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


class MemoryReader(Protocol):
    """FFN-M's output for one micro-batch."""

    def __call__(self, layer: int) -> Tensor:
        """m_l of a layer, [batch, sequence, hidden], not scaled by alpha."""
        ...


@runtime_checkable
class TokenReader(MemoryReader, Protocol):
    """A reader that may have all layers of a token together, as a decoder wants them."""

    def of_token(self) -> Tensor | None:
        """m_l of all layers of a token that was opened alone, [layers, hidden]; None: ask layer by layer."""
        ...


class MemorySource(Protocol):
    """Makes a reader for each micro-batch."""

    def open(self, ids: Tensor, x0: Any) -> MemoryReader:
        """ids int64 [batch, sequence]; x0: their embeddings [batch, sequence, hidden]."""
        ...


@runtime_checkable
class EarlySource(MemorySource, Protocol):
    """A source that can start reading before `open` needs the rows."""

    def request(self, ids: Tensor) -> None:
        """ids int64 [...] on the CPU will be opened soon: start reading, without waiting."""
        ...


@runtime_checkable
class EmbeddingSource(MemorySource, Protocol):
    """A source that has x0 too, for a model without an embedding."""

    def open_with_x0(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, MemoryReader]:
        """ids int64 [batch, sequence] -> x0 [batch, sequence, hidden], where ids are, and the reader."""
        ...


class Positions:
    """Which positions of a micro-batch are on this rank: all of them, without sequence parallelism.

    parallel/tensor/collectives.py has the subclass that splits them over the tensor-parallel ranks.
    """

    shards = 1  # ranks that the positions are split over

    def gather(self, x: Tensor) -> Tensor:
        """x [..., local positions, hidden] -> [..., positions, hidden]."""
        return x

    def local(self, x: Tensor, dim: int) -> Tensor:
        """x with all positions along `dim` -> x with this rank's positions."""
        return x
