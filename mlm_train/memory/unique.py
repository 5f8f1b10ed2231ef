"""FFN-M once per distinct token of a micro-batch, gathered to the positions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemoryReader, Positions


class DistinctIds(NamedTuple):
    """The distinct ids of a micro-batch [batch, sequence]: the first position of each, int64 [distinct], and
    which of them each position has, of the micro-batch's shape.
    """

    first: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, ids: Tensor) -> "DistinctIds":
        """On the device of `ids`; a GPU is waited for."""
        distinct, inverse = ids.unique(return_inverse=True)
        offsets = torch.arange(ids.numel(), device=ids.device)
        first = torch.full_like(distinct, ids.numel())
        first.scatter_reduce_(0, inverse.flatten(), offsets, "amin")
        return cls(first, inverse)

    def to(self, device: torch.device) -> "DistinctIds":
        """On a device."""
        return DistinctIds(*(tensor.to(device, non_blocking=True) for tensor in self))


class UniqueSource:
    """A memory source that computes FFN_M(N_m(x0)) for each distinct id.

    Exact: positions of one id share x0, so the gather's backward sums their gradients, and the whole
    sum reaches the embedding row through the id's first position.
    """

    def __init__(self, blocks: Mapping[int, MemoryBlock], positions: Positions) -> None:
        self.blocks, self.positions = blocks, positions
        self.step_ids = torch.empty(0, dtype=torch.int64)
        self.planned: Sequence[DistinctIds] = ()

    def begin(self, ids: Tensor, planned: Sequence[DistinctIds]) -> None:
        """Take what was found on the CPU of a step's micro-batches, which follow each other in `ids`."""
        self.step_ids, self.planned = ids, [found.to(ids.device) for found in planned]

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids int64 [batch, sequence], of all positions; x0 [batch, local positions, hidden].

        Where positions are split over ranks, so are the distinct rows.
        """
        first, inverse = self._distinct(ids)
        # Shards have one size: rows that no lookup reads pad the last.
        first = F.pad(first, (0, -first.numel() % self.positions.shards))
        rows = self.positions.local(self.positions.gather(x0).flatten(0, -2)[first], 0)
        index = self.positions.local(inverse, 1)

        def read(layer: int) -> Tensor:
            # Cast to x0's dtype before the gather: its backward then sums in fp32 under bf16 autocast too.
            memory = self.positions.gather(self.blocks[layer].ffn_m_of_micro_batch(rows).to(x0.dtype))
            return memory.index_select(0, index.flatten()).view(x0.shape)

        return read

    def _distinct(self, ids: Tensor) -> DistinctIds:
        """Those of a micro-batch: planned where it is a part of `begin`'s ids, which its address tells."""
        if ids.untyped_storage().data_ptr() != self.step_ids.untyped_storage().data_ptr():
            return DistinctIds.of(ids)
        return self.planned[(ids.storage_offset() - self.step_ids.storage_offset()) // ids.numel()]

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of a step, rows times layers; distinct: ids, summed over micro-batches."""
        return len(self.blocks) * distinct
