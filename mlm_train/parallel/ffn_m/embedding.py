"""The embedding, owned by rows over the ranks of the first stage: rows go out, gradient rows come home.

A rank has the rows of the ids rank, rank + ranks, ...: frequent tokens have low ids in most vocabularies, so
that each rank serves as many. Checkpoints hold consecutive rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlm_train.memory.rows import add_rows
from mlm_train.model.logical import Part
from mlm_train.parallel.mesh.exchange import counts_of, exchange, gather_ids, inverse
from mlm_train.parallel.mesh.groups import CpuGroups
from mlm_train.parallel.tensor.collectives import TensorGroup


class RowEmbedding(nn.Module):
    """This rank's rows of the embedding; x0 of a step's ids comes from `OwnedRows`."""

    owned = True

    def __init__(self, vocab_size: int, hidden_size: int, rank: int, ranks: int) -> None:
        super().__init__()
        self.vocab_size, self.rank, self.ranks = vocab_size, rank, ranks
        self.weight = nn.Parameter(torch.empty(-(-vocab_size // ranks), hidden_size))

    def logical_parts(self) -> list[Part]:
        """The rows of this rank in a checkpoint (see RowOrder)."""
        start, stop = self.stored
        return [Part(None, 0, 0, stop - start, start, self.vocab_size)]

    @property
    def stored(self) -> tuple[int, int]:
        """[start, stop) of the ids whose rows this rank reads and writes in checkpoints."""
        size = len(self.weight)
        return min(self.rank * size, self.vocab_size), min((self.rank + 1) * size, self.vocab_size)


class RowOrder:
    """Between a rank's own rows and those that it stores in checkpoints; every rank of `group` calls it."""

    def __init__(self, embedding: RowEmbedding, group: Any) -> None:
        self.group, self.rows, ranks = group, len(embedding.weight), embedding.ranks
        own = torch.arange(embedding.rank, embedding.vocab_size, ranks)
        stored = torch.arange(*embedding.stored)
        self.own, self.stored = len(own), len(stored)
        self.kept_by = counts_of(own // self.rows, ranks)
        self.owned_by = counts_of(stored % ranks, ranks)
        self.order = (stored % ranks).argsort(stable=True)

    def to_checkpoint(self, own: Tensor) -> Tensor:
        """Own rows [rows, hidden], or flat, -> rows to store, of the same shape; padding is zero."""
        rows = own.view(self.rows, -1)
        out = torch.zeros_like(rows)
        out[self.order] = exchange(rows[: self.own], self.kept_by, self.owned_by, self.group)[0]
        return out.view_as(own)

    def from_checkpoint(self, stored: Tensor) -> Tensor:
        """The inverse."""
        rows = stored.view(self.rows, -1)
        out = torch.zeros_like(rows)
        out[: self.own] = exchange(rows[self.order], self.owned_by, self.kept_by, self.group)[0]
        return out.view_as(stored)


@dataclass(frozen=True)
class RowsPlan:
    """Who sends which rows of the embedding to whom in a step, on the CPU.

    own, common: how many ids are asked for, and `mine` of the common ones; where: of them, in the distinct
    ones; order: of these by owner; received, sent: rows per rank; index: of the rows to send, in this rank's.
    """

    own: int
    mine: int
    common: int
    where: Tensor
    order: Tensor
    received: list[int]
    sent: list[int]
    index: Tensor


class OwnedRows:
    """x0 of a step's ids from the ranks that own the rows, and the way home of its gradient.

    dtype, gradient_dtype: in which they travel.
    """

    def __init__(
        self,
        embedding: RowEmbedding,
        group: Any,
        cpu_groups: CpuGroups,
        tensor: TensorGroup,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
    ) -> None:
        self.embedding, self.group, self.cpu_groups, self.tensor = embedding, group, cpu_groups, tensor
        self.dtype, self.gradient_dtype = dtype, gradient_dtype
        self.splits = tensor.size // tensor.shards  # tensor-parallel ranks with the same common ids

    def plan(self, own: Tensor, common: Tensor, ahead: bool) -> RowsPlan:
        """Plan the fetch of own ids, and of those that the tensor-parallel ranks have in common.

        own, common: int64 [any number], on the CPU. Under sequence parallelism `common` is this rank's.
        """
        ranks, me = self.embedding.ranks, self.embedding.rank
        each = -(-len(common) // self.splits)
        mine = common[self.tensor.rank * each :][:each] if self.splits > 1 else common
        wanted, where = torch.cat((own, mine)).unique(return_inverse=True)
        by_rank = gather_ids(wanted, self.cpu_groups.of(ahead))
        owner = wanted % ranks
        order = owner.argsort(stable=True)
        served = [ids[ids % ranks == me] // ranks for ids in by_rank]
        return RowsPlan(
            len(own), len(mine), len(common), where, order, counts_of(owner, ranks),
            list(map(len, served)), torch.cat(served),
        )  # fmt: skip

    def fetch(self, plan: RowsPlan) -> Tensor:
        """x0 of the plan's own ids, then of the common ones: fp32 [ids, hidden]."""
        weight = self.embedding.weight.detach()
        self.counts = plan
        self.where, self.order, self.index = (
            tensor.to(weight.device, non_blocking=True) for tensor in (plan.where, plan.order, plan.index)
        )
        rows = weight[self.index].to(self.dtype)
        arrived, _ = exchange(rows, plan.sent, plan.received, self.group)
        rows = arrived[inverse(self.order)[self.where]].float()
        return rows if self.splits == 1 else self._with_all(rows, plan.common)

    def _with_all(self, rows: Tensor, count: int) -> Tensor:
        """Own rows, then those that the tensor-parallel ranks have fetched of the common ids."""
        own = self.counts.own
        part = rows.new_zeros(-(-count // self.splits), rows.shape[1])
        part[: self.counts.mine] = rows[own:]
        return torch.cat((rows[:own], self.tensor.all_gather(part)[:count]))

    def give_back(self, gradient: Tensor) -> None:
        """Add the gradient of `fetch`'s rows, fp32 of the same shape, to the owners' rows."""
        if self.splits > 1:  # equal on the tensor-parallel ranks
            own, each = self.counts.own, -(-self.counts.common // self.splits)
            common = gradient[own:][self.tensor.rank * each :][:each]
            gradient = torch.cat((gradient[:own], common))
        wanted = gradient.new_zeros(len(self.order), gradient.shape[1])
        add_rows(wanted, self.where, gradient)
        outgoing = wanted[self.order].to(self.gradient_dtype)
        home, _ = exchange(outgoing, self.counts.received, self.counts.sent, self.group)
        weight = self.embedding.weight
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        add_rows(weight.grad, self.index, home)
