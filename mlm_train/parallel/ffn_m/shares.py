"""Tables shared over data parallel: each rank computes a part of all ranks' rows, and rows are exchanged.

The union of the ranks' distinct ids is split by a hash of the id, so FFN-M's work on a rank falls as the
group grows. Rows and their gradients travel by all-to-all, once a step and layer each way.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.memory import RowSharing
from mlm_train.memory.rows import add_rows

PRIME = 2654435761  # Knuth's multiplicative hash: ids of neighbouring frequency go to different ranks


def owners(ids: Tensor, ranks: int) -> Tensor:
    """The rank that computes each id's rows."""
    return (ids * PRIME % 2**32 >> 8) % ranks


class DataParallelSharing(RowSharing):
    """A share of the step's rows of a data-parallel group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def begin(self, ids: Tensor) -> Tensor:
        owner = owners(ids, self.size)
        # Ids in the order of their owners: what is asked of a rank lies together.
        self.order = owner.argsort(stable=True)
        self.asked = owner.bincount(minlength=self.size)
        self.given = torch.empty_like(self.asked)
        dist.all_to_all_single(self.given, self.asked, group=self.group)
        wanted = self._exchange(ids[self.order], self.asked, self.given)
        mine, self.index = wanted.unique(return_inverse=True)
        self.share = len(mine)
        return mine

    def spread(self, rows: Tensor) -> Tensor:
        found = self._exchange(rows[self.index], self.given, self.asked)
        return torch.empty_like(found).index_copy_(0, self.order, found)

    def collect(self, rows: Tensor) -> Tensor:
        returned = self._exchange(rows[self.order], self.asked, self.given)
        total = rows.new_zeros(self.share, rows.shape[1])
        add_rows(total, self.index, returned)
        return total

    def bytes_per_step(self, layers: int, hidden: int, element: int) -> int:
        """Payload bytes that this rank sends in the training step begun last, by formula.

        Counts and ids once, then each layer's rows (of `element` bytes a number) and fp32 gradient rows.
        Convention: bench/traffic.py.
        """
        rank = dist.get_rank(self.group)
        asked, given = (int(counts.sum() - counts[rank]) for counts in (self.asked, self.given))
        return 8 * (self.size - 1 + asked) + layers * hidden * (element * given + 4 * asked)

    def _exchange(self, rows: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """Rows of which each rank gets `here` many, in turn -> those that each sent, `there` many."""
        received = rows.new_empty(int(there.sum()), *rows.shape[1:])
        dist.all_to_all_single(received, rows, there.tolist(), here.tolist(), group=self.group)
        return received
