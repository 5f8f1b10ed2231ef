"""FFN-M once per distinct token of a micro-batch, then gathered to the positions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemoryReader


class Unique:
    """A memory source that computes FFN_M(N_m(x0)) for each distinct id.

    Exact: positions of one id share x0, so the gather's backward sums their gradients, and the whole
    sum reaches the embedding row through the id's first position.
    """

    def __init__(self, blocks: Mapping[int, MemoryBlock]) -> None:
        self.blocks = blocks

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids int64 [batch, sequence]; x0 [batch, sequence, hidden]."""
        flat = ids.reshape(-1)
        distinct, inverse = flat.unique(return_inverse=True)
        positions = torch.arange(flat.numel(), device=flat.device)
        first = torch.full_like(distinct, flat.numel())
        first.scatter_reduce_(0, inverse, positions, "amin")
        rows = x0.flatten(0, -2)[first]

        def read(layer: int) -> Tensor:
            # In x0's dtype before the gather: its backward then sums in fp32 under bf16 autocast too.
            memory = self.blocks[layer].ffn_m(rows).to(x0.dtype)
            return memory.index_select(0, inverse).view(x0.shape)

        return read
