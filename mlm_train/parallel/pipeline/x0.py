"""The x0 channel: brings x0 to FFN-M on every pipeline stage, and its gradient to the embedding.

Three transports implement one interface. `broadcast`: the step's distinct rows are broadcast once; each stage
looks x0 up and sums its gradient in a table of the same shape; one reduce returns it. `relay`: x0 is passed
with the hidden state from stage to stage. `replicate`: every stage has a copy of the embedding. The first
stage has the embedding's rows itself, or gets the step's from the ranks that own them (ffn_m/embedding.py).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.memory import TableSource
from mlm_train.memory.rows import Lookup
from mlm_train.memory.table import TablePlan
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.ffn_m.embedding import OwnedRows
from mlm_train.parallel.ffn_m.owned import OwnedTables
from mlm_train.parallel.tensor.collectives import TensorGroup


class X0Channel(Protocol):
    """Provides x0 to a stage. `relays`: whether stages pass x0 on as a second tensor."""

    relays: bool

    def plan(self, ids: Tensor, passes: int, ahead: bool) -> Any:
        """What `begin` takes. ids int64 [passes * batch, sequence], on the CPU; passes: micro-batches.

        ahead: whether it is of a later step, by the data thread, which has process groups of its own.
        """
        ...

    def begin(self, plan: Any) -> Tensor:
        """Before a step: an index of the same rows as the ids, on the device, for `x0`."""
        ...

    def x0(self, ids: Tensor, index: Tensor) -> Tensor:
        """x0 [batch, local positions, hidden] of a micro-batch, differentiable."""
        ...

    def finish(self) -> None:
        """After a step's backward passes: add the gradient of x0 to the embedding's."""
        ...

    def bytes_per_step(self, distinct: int, tokens: int) -> int:
        """Payload bytes per training step of x0 and its gradient between the stages of one pipeline.

        `distinct`: distinct ids of the step on this data-parallel rank; `tokens`: its positions. Convention:
        bench/traffic.py.
        """
        ...


class LocalRows:
    """x0 of a step's ids from this rank's own embedding."""

    def __init__(self, model: Transformer, tensor: TensorGroup, device: torch.device) -> None:
        self.model, self.tensor, self.device = model, tensor, device

    def plan(self, own: Tensor, common: Tensor, ahead: bool) -> tuple[int, Tensor]:
        """Of own ids, then common ones; both equal on all tensor-parallel ranks."""
        return len(own), torch.cat((own, common))

    def fetch(self, plan: tuple[int, Tensor]) -> Tensor:
        """x0 of the plan's ids, fp32 [ids, hidden]."""
        self.own, ids = plan
        self.embedded = self.model.rows(ids.to(self.device, non_blocking=True))
        return self.embedded.detach().clone()

    def give_back(self, gradient: Tensor) -> None:
        """Add the gradient of `fetch`'s rows, of the same shape, to the embedding's.

        That of own rows has a part on each tensor-parallel rank, and under sequence parallelism all has.
        """
        if self.tensor.shards > 1:
            gradient = self.tensor.all_reduce(gradient)
        elif self.tensor.size > 1 and self.own:
            gradient = torch.cat((self.tensor.all_reduce(gradient[: self.own]), gradient[self.own :]))
        self.embedded.backward(gradient)


@dataclass
class Channel:
    """The common part of transports: this rank's model, groups and device.

    `boundaries`: the number of boundaries between stages on different ranks, virtual stages included;
    `tables`: the memory source that needs the step's rows, if FFN-M has tables; `all_layers_tabled`: whether
    every layer of every stage has a table, since all stages must send and receive the same rows; `rows_of`:
    where the first stage gets the step's rows; `local`: whether only those of this rank's own positions.
    """

    model: Transformer
    group: Any  # of the pipeline
    tensor: TensorGroup
    device: torch.device
    boundaries: int
    tables: TableSource | None = None
    all_layers_tabled: bool = False
    rows_of: LocalRows | OwnedRows | None = None
    local: bool = False

    def __post_init__(self) -> None:
        self.owns = dist.get_rank(self.group) == 0
        self.anchor = torch.zeros(1, device=self.device, requires_grad=True)
        self.rows, self.table = torch.empty(0), torch.empty(0)  # x0 of a step's ids, and its gradient

    @property
    def looks_up(self) -> bool:
        """Whether x0 on the first stage is looked up in rows that other ranks own."""
        return self.owns and isinstance(self.rows_of, OwnedRows)

    def plan(self, ids: Tensor, passes: int, ahead: bool) -> Any:
        """The ids, for transports that need no more."""
        return ids

    def _distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct ids of all positions, or of those on this rank, and their index for `_lookup`."""
        return (self.tensor.local(ids, 1) if self.local else ids).unique(return_inverse=True)

    def _lookup(self, index: Tensor) -> Tensor:
        """Rows of `self.rows` by index; the backward adds into `self.table`."""
        index = index if self.local else self.tensor.local(index, 1)
        return Lookup.apply(index, self.rows, self.table, self.anchor)


@dataclass(frozen=True)
class BroadcastPlan:
    """A step's rows of x0. index: of positions in them; needed: how many, the first ones, tables are computed
    from; sent: how many, the first ones, go to the other stages; tables, rows: the plans of their sources.
    """

    index: Tensor
    needed: int
    sent: int
    tables: TablePlan | None
    rows: Any


class Broadcast(Channel):
    """The rows of the step's distinct ids are broadcast once over the pipeline group.

    With tables the rows that they are computed from are broadcast. If those are rows of other ids
    (memory.placement), those of its own ids stay on the first stage, unless some layers have no table.
    """

    relays = False

    def plan(self, ids: Tensor, passes: int, ahead: bool) -> BroadcastPlan:
        distinct, index = self._distinct(ids)
        tables = self.tables.plan(ids, distinct, passes, ahead) if self.tables else None
        needed, none = distinct if tables is None else tables.needed, distinct[:0]
        common = distinct
        if needed is not distinct:
            common, index = torch.cat((needed, distinct)), index + len(needed)
        sent = len(needed) if self.all_layers_tabled else len(common)
        rows = None
        if self.rows_of is not None:
            owned = isinstance(self.tables, OwnedTables)  # then each rank needs rows of its own
            asked = (needed, distinct) if owned else (none, common)
            rows = self.rows_of.plan(*asked, ahead)
        return BroadcastPlan(index, len(needed), sent, tables, rows)

    def begin(self, plan: BroadcastPlan) -> Tensor:
        self.needed, self.sent = plan.needed, plan.sent
        if self.rows_of is not None:
            self.rows = self.rows_of.fetch(plan.rows)
        else:
            self.rows = torch.empty(self.sent, self.model.config.hidden_size, device=self.device)
        dist.broadcast(self.rows[: self.sent], self.source, group=self.group)
        self.table = torch.zeros_like(self.rows)
        if self.tables and plan.tables is not None:
            self.tables.begin(plan.tables, self.rows[: self.needed])
        return plan.index.to(self.device, non_blocking=True)

    @property
    def source(self) -> int:
        """The rank of the first stage."""
        return dist.get_global_rank(self.group, 0)

    def x0(self, ids: Tensor, index: Tensor) -> Tensor:
        return self._lookup(index)

    def finish(self) -> None:
        if self.tables:
            self.table[: self.needed] += self.tables.finish()
        dist.reduce(self.table[: self.sent], self.source, group=self.group)
        if self.rows_of is not None:
            self.rows_of.give_back(self.table)

    def bytes_per_step(self, distinct: int, tokens: int) -> int:
        others = dist.get_world_size(self.group) - 1
        return 2 * 4 * distinct * self.model.config.hidden_size * others


class Relay(Channel):
    """x0 is passed with the hidden state: the plain method, and the reference."""

    relays = True

    def plan(self, ids: Tensor, passes: int, ahead: bool) -> tuple[Tensor, Any]:
        if not self.looks_up or self.rows_of is None:
            return ids, None
        distinct, index = self._distinct(ids)
        return index, self.rows_of.plan(distinct[:0], distinct, ahead)

    def begin(self, plan: tuple[Tensor, Any]) -> Tensor:
        index, rows = plan
        if rows is not None and self.rows_of is not None:
            self.rows = self.rows_of.fetch(rows)
            self.table = torch.zeros_like(self.rows)
        return index.to(self.device, non_blocking=True)

    def x0(self, ids: Tensor, index: Tensor) -> Tensor:
        # Called on the first stage only.
        return self._lookup(index) if self.looks_up else self.model.embed(ids)

    def finish(self) -> None:
        if self.looks_up and self.rows_of is not None:
            self.rows_of.give_back(self.table)

    def bytes_per_step(self, distinct: int, tokens: int) -> int:
        # Crosses every boundary between stages; a rank with virtual stages has several.
        return 2 * 4 * tokens * self.model.config.hidden_size * self.boundaries


class LocalEmbedding(Relay):
    """Without FFN-M: the first stage embeds, and x0 is not passed on."""

    relays = False


class Replicate(Channel):
    """Every stage embeds; the embedding's gradients are summed over the pipeline group."""

    relays = False

    def begin(self, plan: Tensor) -> Tensor:
        return plan.to(self.device, non_blocking=True)

    def x0(self, ids: Tensor, index: Tensor) -> Tensor:
        return self.model.embed(ids)

    def finish(self) -> None:
        assert self.model.embed_tokens is not None
        weight = self.model.embed_tokens.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        dist.all_reduce(weight.grad, group=self.group)

    def bytes_per_step(self, distinct: int, tokens: int) -> int:
        others = dist.get_world_size(self.group) - 1
        return 2 * 4 * self.model.config.vocab_size * self.model.config.hidden_size * others


# Names of config field parallel.x0_transport (config/choices.py lists them too).
TRANSPORTS: dict[str, type[Broadcast] | type[Relay] | type[Replicate]] = {
    "broadcast": Broadcast,
    "relay": Relay,
    "replicate": Replicate,
}
