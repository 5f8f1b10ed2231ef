"""The x0 channel: brings x0 to FFN-M on every pipeline stage, and its gradient to the embedding.

Three transports implement one interface. `broadcast`: the step's distinct rows are broadcast once; each stage
looks x0 up and sums its gradient in a table of the same shape; one reduce returns it. `relay`: x0 is passed
with the hidden state from stage to stage. `replicate`: every stage has a copy of the embedding.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.memory import TableSource
from mlm_train.memory.rows import Lookup
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.tensor.collectives import TensorGroup


class X0Channel(Protocol):
    """Provides x0 to a stage. `relays`: whether stages pass x0 on as a second tensor."""

    relays: bool

    def begin(self, ids: Tensor) -> Tensor:
        """Before a step: ids int64 [micro-batches * batch, sequence] -> an index of the same shape."""
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


@dataclass
class Channel:
    """The common part of transports: this rank's model, groups and device.

    `boundaries`: the number of boundaries between stages on different ranks, virtual stages included;
    `tables`: the memory source that needs the step's rows, if FFN-M has tables; `all_layers_tabled`: whether
    every layer of every stage has a table, since all stages must send and receive the same rows.
    """

    model: Transformer
    group: Any  # of the pipeline
    tensor: TensorGroup
    device: torch.device
    boundaries: int
    tables: TableSource | None = None
    all_layers_tabled: bool = False

    def __post_init__(self) -> None:
        """Initialise a transport."""


class Broadcast(Channel):
    """The rows of the step's distinct ids are broadcast once over the pipeline group.

    With tables the rows that they are computed from are broadcast. With memory.shared those are rows of other
    ids, and the rows of this rank's own ids stay on the first stage, unless some layers have no table.
    """

    relays = False

    def __post_init__(self) -> None:
        self.source = dist.get_global_rank(self.group, 0)
        self.owns = dist.get_rank(self.group) == 0
        self.anchor = torch.zeros(1, device=self.device, requires_grad=True)

    def begin(self, ids: Tensor) -> Tensor:
        distinct, index = ids.unique(return_inverse=True)
        shared = self.tables.share.begin(distinct) if self.tables else distinct
        self.shared = len(shared)
        wanted = shared if shared is distinct else torch.cat((shared, distinct))
        if shared is not distinct:
            index = index + len(shared)
        sent = len(shared) if self.all_layers_tabled else len(wanted)
        if self.owns:
            self.embedded = self.model.rows(wanted)
            rows = self.embedded.detach().clone()
        else:
            rows = torch.empty(sent, self.model.config.hidden_size, device=self.device)
        dist.broadcast(rows[:sent], self.source, group=self.group)
        self.sent = sent
        self.rows = rows
        self.table = torch.zeros_like(self.rows)
        if self.tables:
            self.tables.begin(distinct, self.rows[: self.shared])
        return index

    def x0(self, ids: Tensor, index: Tensor) -> Tensor:
        return Lookup.apply(self.tensor.local(index, 1), self.rows, self.table, self.anchor)

    def finish(self) -> None:
        if self.tables:
            self.table[: self.shared] += self.tables.finish()
        dist.reduce(self.table[: self.sent], self.source, group=self.group)
        if self.owns:
            # Under sequence parallelism each rank has the gradients of its local positions.
            table = self.tensor.all_reduce(self.table) if self.tensor.shards > 1 else self.table
            self.embedded.backward(table)

    def bytes_per_step(self, distinct: int, tokens: int) -> int:
        others = dist.get_world_size(self.group) - 1
        return 2 * 4 * distinct * self.model.config.hidden_size * others


class Relay(Channel):
    """x0 is passed with the hidden state: the plain method, and the reference."""

    relays = True

    def begin(self, ids: Tensor) -> Tensor:
        return ids

    def x0(self, ids: Tensor, index: Tensor) -> Tensor:
        return self.model.embed(ids)  # called on the first stage only

    def finish(self) -> None:
        pass

    def bytes_per_step(self, distinct: int, tokens: int) -> int:
        # Crosses every boundary between stages; a rank with virtual stages has several.
        return 2 * 4 * tokens * self.model.config.hidden_size * self.boundaries


class LocalEmbedding(Relay):
    """Without FFN-M: the first stage embeds, and x0 is not passed on."""

    relays = False


class Replicate(Channel):
    """Every stage embeds; the embedding's gradients are summed over the pipeline group."""

    relays = False

    def begin(self, ids: Tensor) -> Tensor:
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
