"""Tables shared over data parallel: each rank computes a part of all ranks' rows, and rows are exchanged.

The union of the ranks' distinct ids is split by a hash of the id, so FFN-M's work per rank falls as the
group grows. Rows and their gradients are exchanged by all-to-all, once per step and layer in each direction.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.memory import RowSharing
from mlm_train.memory.rows import add_rows
from mlm_train.parallel.ffn_m.owners import units_of
from mlm_train.parallel.mesh.exchange import exchange


class DataParallelSharing(RowSharing):
    """Computes a part of the step's rows of a data-parallel group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def begin(self, ids: Tensor) -> Tensor:
        owner = units_of(ids, self.size)
        # Ids in the order of their owners, so that the requests to a rank are contiguous.
        self.order = owner.argsort(stable=True)
        self.requested = owner.bincount(minlength=self.size)  # rows per owner
        self.served = torch.empty_like(self.requested)  # rows per requesting rank
        dist.all_to_all_single(self.served, self.requested, group=self.group)
        requests = self._exchange(ids[self.order], self.requested, self.served)
        computed, self.index = requests.unique(return_inverse=True)
        self.share = len(computed)
        return computed

    def spread(self, rows: Tensor) -> Tensor:
        received = self._exchange(rows[self.index], self.served, self.requested)
        return torch.empty_like(received).index_copy_(0, self.order, received)

    def collect(self, rows: Tensor) -> Tensor:
        received = self._exchange(rows[self.order], self.requested, self.served)
        total = rows.new_zeros(self.share, rows.shape[1])
        add_rows(total, self.index, received)
        return total

    def bytes_per_step(self, layers: int, hidden: int, element: int) -> int:
        """Payload bytes that this rank sends in the training step started last, by formula.

        Counts and ids once, then rows (`element` bytes per number) and fp32 gradient rows of each layer.
        Convention: bench/traffic.py.
        """
        rank = dist.get_rank(self.group)
        requested, served = (int(counts.sum() - counts[rank]) for counts in (self.requested, self.served))
        return 8 * (self.size - 1 + requested) + layers * hidden * (element * served + 4 * requested)

    def _exchange(self, rows: Tensor, sent: Tensor, received: Tensor) -> Tensor:
        """All-to-all of rows [sum(sent), ...] -> [sum(received), ...]; sent, received: int64 [ranks]."""
        return exchange(rows, sent.tolist(), received.tolist(), self.group)[0]
