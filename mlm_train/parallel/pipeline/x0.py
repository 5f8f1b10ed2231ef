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
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.ffn_m.embedding import OwnedRows
from mlm_train.parallel.ffn_m.owned import OwnedTables
from mlm_train.parallel.tensor.collectives import TensorGroup


class X0Channel(Protocol):
    """Provides x0 to a stage. `relays`: whether stages pass x0 on as a second tensor."""

    relays: bool

    def begin(self, ids: Tensor, passes: int) -> Tensor:
        """Before a step: ids int64 [passes * batch, sequence] -> an index of the same rows, for `x0`.

        passes: micro-batches.
        """
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

    def __init__(self, model: Transformer, tensor: TensorGroup) -> None:
        self.model, self.tensor = model, tensor

    def fetch(self, own: Tensor, common: Tensor) -> Tensor:
        """x0 of own ids, then of common ones, fp32 [ids, hidden]; both equal on all tensor-parallel ranks."""
        self.own = len(own)
        self.embedded = self.model.rows(torch.cat((own, common)))
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

    def _distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct ids of all positions, or of those on this rank, and their index for `_lookup`."""
        return (self.tensor.local(ids, 1) if self.local else ids).unique(return_inverse=True)

    def _lookup(self, index: Tensor) -> Tensor:
        """Rows of `self.rows` by index; the backward adds into `self.table`."""
        index = index if self.local else self.tensor.local(index, 1)
        return Lookup.apply(index, self.rows, self.table, self.anchor)


class Broadcast(Channel):
    """The rows of the step's distinct ids are broadcast once over the pipeline group.

    With tables the rows that they are computed from are broadcast. If those are rows of other ids
    (memory.placement), those of its own ids stay on the first stage, unless some layers have no table.
    """

    relays = False

    def begin(self, ids: Tensor, passes: int) -> Tensor:
        distinct, index = self._distinct(ids)
        needed = self.tables.request(ids, distinct, passes) if self.tables else distinct
        self.needed, none = len(needed), distinct[:0]
        common = distinct if needed is distinct else torch.cat((needed, distinct))
        if needed is not distinct:
            index = index + len(needed)
        self.sent = len(needed) if self.all_layers_tabled else len(common)
        if self.owns:
            assert self.rows_of is not None
            self.rows = self.rows_of.fetch(
                *((needed, distinct) if isinstance(self.tables, OwnedTables) else (none, common))
            )
        else:
            self.rows = torch.empty(self.sent, self.model.config.hidden_size, device=self.device)
        dist.broadcast(self.rows[: self.sent], self.source, group=self.group)
        self.table = torch.zeros_like(self.rows)
        if self.tables:
            self.tables.begin(distinct, self.rows[: self.needed])
        return index

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
        if self.owns:
            assert self.rows_of is not None
            self.rows_of.give_back(self.table)

    def bytes_per_step(self, distinct: int, tokens: int) -> int:
        others = dist.get_world_size(self.group) - 1
        return 2 * 4 * distinct * self.model.config.hidden_size * others


class Relay(Channel):
    """x0 is passed with the hidden state: the plain method, and the reference."""

    relays = True

    def begin(self, ids: Tensor, passes: int) -> Tensor:
        if not self.looks_up:
            return ids
        distinct, index = self._distinct(ids)
        assert self.rows_of is not None
        self.rows = self.rows_of.fetch(distinct[:0], distinct)
        self.table = torch.zeros_like(self.rows)
        return index

    def x0(self, ids: Tensor, index: Tensor) -> Tensor:
        # Called on the first stage only.
        return self._lookup(index) if self.looks_up else self.model.embed(ids)

    def finish(self) -> None:
        if self.looks_up:
            assert self.rows_of is not None
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

    def begin(self, ids: Tensor, passes: int) -> Tensor:
        return ids

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
