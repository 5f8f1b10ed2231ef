"""Tables shared over data parallel: each rank computes a part of all ranks' rows, and rows are exchanged.

The union of the ranks' distinct ids is split by a hash of the id, so FFN-M's work per rank falls as the
group grows. Rows and their gradients are exchanged by all-to-all, once per step and layer in each direction.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.memory import RowSharing
from mlm_train.memory.rows import add_rows
from mlm_train.parallel.ffn_m.owners import units_of
from mlm_train.parallel.mesh.exchange import counts_of, exchange, gather_ids
from mlm_train.parallel.mesh.groups import CpuGroups


@dataclass(frozen=True)
class SharePlan:
    """Who computes which rows of a step, on the CPU.

    order: of this rank's ids by their owner; requested, served: rows per owner, and per asking rank; index:
    of the rows to send, among those computed here, which are `share`.
    """

    order: Tensor
    requested: list[int]
    served: list[int]
    index: Tensor
    share: int


class DataParallelSharing(RowSharing):
    """Computes a part of the step's rows of a data-parallel group. cpu_groups: the same ranks, for ids."""

    def __init__(self, group: Any, cpu_groups: CpuGroups, device: torch.device) -> None:
        self.group, self.cpu_groups, self.device = group, cpu_groups, device
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def plan(self, ids: Tensor, ahead: bool) -> tuple[Tensor, SharePlan]:
        owner = units_of(ids, self.size)
        asked = [
            ids[units_of(ids, self.size) == self.rank] for ids in gather_ids(ids, self.cpu_groups.of(ahead))
        ]
        computed, index = torch.cat(asked).unique(return_inverse=True)
        order, served = owner.argsort(stable=True), list(map(len, asked))
        return computed, SharePlan(order, counts_of(owner, self.size), served, index, len(computed))

    def begin(self, plan: SharePlan) -> None:
        self.requested, self.served, self.share = plan.requested, plan.served, plan.share
        self.order, self.index = (
            tensor.to(self.device, non_blocking=True) for tensor in (plan.order, plan.index)
        )

    def spread(self, rows: Tensor) -> Tensor:
        received, _ = exchange(rows[self.index], self.served, self.requested, self.group)
        return torch.empty_like(received).index_copy_(0, self.order, received)

    def collect(self, rows: Tensor) -> Tensor:
        received, _ = exchange(rows[self.order], self.requested, self.served, self.group)
        total = rows.new_zeros(self.share, rows.shape[1])
        add_rows(total, self.index, received)
        return total

    def bytes_per_step(self, layers: int, hidden: int, element: int) -> int:
        """Payload bytes that this rank sends in the training step started last, by formula.

        Rows (`element` bytes per number) and fp32 gradient rows of each layer. Convention: bench/traffic.py.
        """
        requested, served = (sum(counts) - counts[self.rank] for counts in (self.requested, self.served))
        return layers * hidden * (element * served + 4 * requested)
