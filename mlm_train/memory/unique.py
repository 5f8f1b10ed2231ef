"""FFN-M once per distinct token of a micro-batch, gathered to the positions."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemoryReader, Positions


class UniqueSource:
    """A memory source that computes FFN_M(N_m(x0)) for each distinct id.

    Exact: positions of one id share x0, so the gather's backward sums their gradients, and the whole
    sum reaches the embedding row through the id's first position.
    """

    def __init__(self, blocks: Mapping[int, MemoryBlock], positions: Positions) -> None:
        self.blocks, self.positions = blocks, positions

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids int64 [batch, sequence], of all positions; x0 [batch, local positions, hidden].

        Where positions are split over ranks, so are the distinct rows.
        """
        distinct, inverse = ids.unique(return_inverse=True)
        offsets = torch.arange(ids.numel(), device=ids.device)
        first = torch.full_like(distinct, ids.numel())
        first.scatter_reduce_(0, inverse.flatten(), offsets, "amin")
        # Shards have one size: rows that no lookup reads pad the last.
        first = F.pad(first, (0, -first.numel() % self.positions.shards))
        rows = self.positions.local(self.positions.gather(x0).flatten(0, -2)[first], 0)
        index = self.positions.local(inverse, 1)

        def read(layer: int) -> Tensor:
            # Cast to x0's dtype before the gather: its backward then sums in fp32 under bf16 autocast too.
            memory = self.positions.gather(self.blocks[layer].ffn_m_of_micro_batch(rows).to(x0.dtype))
            return memory.index_select(0, index.flatten()).view(x0.shape)

        return read

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of a step, rows times layers; distinct: ids, summed over micro-batches."""
        return len(self.blocks) * distinct
