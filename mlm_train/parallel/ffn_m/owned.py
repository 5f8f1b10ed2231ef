"""FFN-M owned by few ranks of a stage: ids go out, rows come back, gradient rows go home.

An owner computes its layers' rows for the distinct ids of all ranks of the stage, so FFN-M's weights are
never gathered, and their gradients are summed among a layer's owners alone. Rows travel in one all-to-all
per group of layers: a group's gradient rows leave while the layers below are still in their backward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from mlm_train.memory.rows import Lookup, add_rows
from mlm_train.memory.step_rows import StepRows
from mlm_train.memory.table import TablePlan, TableSource, no_layer
from mlm_train.memory.unique import UniqueSource
from mlm_train.model.block import MemoryBlock
from mlm_train.model.linear import compute_dtype
from mlm_train.model.source import MemoryReader, Positions
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.ffn_m.owners import Owners, units_of
from mlm_train.parallel.mesh.exchange import counts_of, exchange, gather_ids, inverse
from mlm_train.parallel.mesh.groups import CpuGroups
from mlm_train.parallel.tensor.collectives import TensorGroup

GROUP_BYTES = 64 * 2**20  # of rows in an exchange, where there are several


@dataclass(frozen=True)
class Placement:
    """Where a stage's owned layers are.

    owners: of the layers of this pipeline rank; all_stages: of every pipeline rank's, since x0 of the same
    rows goes to all of them. rank, group: this rank among the stage's, and their group; cpu_groups: theirs
    for ids. every_row: whether a rank gets x0 of all rows of the step, not only of those that it computes.
    gradient_dtype: in which gradient rows travel.
    """

    owners: Owners
    all_stages: Sequence[Owners]
    rank: int
    group: Any
    cpu_groups: CpuGroups
    every_row: bool = False
    gradient_dtype: torch.dtype = torch.float32

    def computes(self, ids: Tensor) -> Tensor:
        """Which ids' x0 this rank needs for the rows that it computes on any stage: bool [ids]."""
        units = units_of(ids, self.owners.ranks)
        needed = torch.full(ids.shape, self.every_row)
        for owners in self.all_stages:
            needed |= owners.computes(self.rank, units)
        return needed


@dataclass(frozen=True)
class Asked:
    """The ids of a step that each rank of the stage asks for, on the CPU, and what follows of them."""

    by_rank: list[Tensor]  # int64, sorted
    everyone: Tensor  # the same in one, and of each id its unit and the rank that asks for it
    units: Tensor
    asker: Tensor
    needed: Tensor  # sorted: those whose x0 this rank needs
    computed: dict[int, Tensor]  # by layer held here, of which of those it computes rows: indices

    @classmethod
    def of(cls, ids: Tensor, placement: Placement, ahead: bool) -> "Asked":
        """Gather the ids of all ranks. ids int64 [any number]: those that this rank asks for."""
        by_rank = gather_ids(ids, placement.cpu_groups.of(ahead))
        owners, rank = placement.owners, placement.rank
        everyone, counts = torch.cat(by_rank), torch.tensor([len(ids) for ids in by_rank])
        union = everyone.unique()
        needed = union[placement.computes(union)]
        units = units_of(needed, owners.ranks)
        computed = {
            layer: (owners.rank_of(layer, units) == rank).nonzero().flatten() for layer in owners.held(rank)
        }
        asker = torch.arange(owners.ranks).repeat_interleave(counts)
        return cls(by_rank, everyone, units_of(everyone, owners.ranks), asker, needed, computed)


def keep_owned(model: Transformer, owners: Owners | None, rank: int, bf16: bool) -> list[nn.Module]:
    """Remove the FFN-M that other ranks own; the modules of this rank's, in bf16 if asked for."""
    owned: list[nn.Module] = []
    if owners is None:
        return owned
    for layer in owners.layers:
        block = model.memory_blocks()[layer]
        if layer in owners.held(rank):
            owned += [*block.memory_layernorm.modules(), *block.memory_mlp.modules()]
        else:
            del block.memory_layernorm, block.memory_mlp
    for module in owned:
        module.owned = True  # type: ignore[assignment]
        if bf16:
            module.bfloat16()
    return owned


@dataclass(frozen=True)
class Messages:
    """Which rows of some layers travel in one exchange of a step, on the CPU.

    Rows go in the order (layer, id) from each owner to each asker; received ones are ordered by owner first.
    """

    layers: Sequence[int]
    held: Sequence[int]  # those of which this rank owns something
    order: Tensor  # of the rows asked for, [layers * ids], as they arrive
    received: list[int]  # rows per owner
    index: Tensor  # of the rows to send, in those computed here of the held layers, one after the other
    sizes: list[int]  # rows computed here, by held layer
    sent: list[int]  # rows per asker

    @classmethod
    def of(cls, layers: Sequence[int], asked: Asked, placement: Placement) -> "Messages":
        """The messages of some layers."""
        owners, rank = placement.owners, placement.rank
        units = units_of(asked.by_rank[rank], owners.ranks)
        owner = torch.stack([owners.rank_of(layer, units) for layer in layers]).flatten()
        held = [layer for layer in layers if layer in asked.computed]
        indices, askers, sizes = [torch.empty(0, dtype=torch.int64)], [asked.asker[:0]], list[int]()
        for layer in held:
            computed = asked.needed[asked.computed[layer]]
            served = owners.rank_of(layer, asked.units) == rank
            indices.append(torch.searchsorted(computed, asked.everyone[served]) + sum(sizes))
            askers.append(asked.asker[served])
            sizes.append(len(computed))
        by_asker = torch.cat(askers).argsort(stable=True)
        index, sent = torch.cat(indices)[by_asker], counts_of(torch.cat(askers), owners.ranks)
        received = counts_of(owner, owners.ranks)
        return cls(layers, held, owner.argsort(stable=True), received, index, sizes, sent)


class RowGroup:
    """The rows of some layers in one exchange of a step, and their gradients.

    `places` [layers, ids]: where in the received rows each row asked for is.
    """

    def __init__(
        self, messages: Messages, placement: Placement, tensor: TensorGroup, device: torch.device
    ) -> None:
        self.messages, self.placement, self.tensor, self.device = messages, placement, tensor, device
        self.layers = messages.layers
        self.order = messages.order.to(device, non_blocking=True)
        self.index = messages.index.to(device, non_blocking=True)
        self.places = inverse(self.order).view(len(self.layers), -1)
        self.rows, self.gradient = torch.empty(0), torch.empty(0)
        self.work: Any = None
        self.reads = 0  # lookups whose backward is still to come

    def send(self, tables: Sequence[Tensor], dtype: torch.dtype, hidden: int, passes: int) -> None:
        """Send rows of the held layers' tables, and have this rank's come. passes: 0 without gradients."""
        table = torch.cat([torch.empty(0, hidden, dtype=dtype, device=self.device), *tables])
        self.outgoing = table[self.index]  # kept until it has left
        self.rows, self.work = exchange(
            self.outgoing, self.messages.sent, self.messages.received, self.placement.group, wait=False
        )
        self.reads = passes * len(self.layers)
        self.training, self.ready = passes > 0, False

    def arrive(self) -> None:
        """Wait for the rows, before the first lookup."""
        if self.ready:
            return
        self.work.wait()
        self.work, self.outgoing, self.ready = None, torch.empty(0), True
        if self.splits > 1:  # each tensor-parallel rank has received some of the ids: all need all of them
            self.rows = self.tensor.all_gather(self.rows[self.places.flatten()])
        self.gradient = self.rows.new_zeros(
            self.rows.shape if self.training else (0, self.rows.shape[1]), dtype=torch.float32
        )

    @property
    def splits(self) -> int:
        """Tensor-parallel ranks that ask for parts of the same rows."""
        return self.tensor.size // self.tensor.shards

    def places_of(self, layer: int) -> Tensor:
        """Where in `rows` the layer's row of each id is, int64 [ids]; after `arrive`."""
        at = self.layers.index(layer)
        if self.splits == 1:
            return self.places[at]
        each = self.places.shape[1]
        first = torch.arange(self.splits, device=self.device) * self.places.numel() + at * each
        return (first[:, None] + torch.arange(each, device=self.device)).flatten()

    def send_home(self) -> None:
        """Send the gradients of this rank's rows to the owners, who get them by `gradients`."""
        gradient = self.gradient
        if self.splits > 1:
            own = gradient.chunk(self.splits)[self.tensor.rank]
            gradient = own[self.order]
        self.outgoing = gradient.to(self.placement.gradient_dtype)
        self.gradient, self.rows = torch.empty(0), torch.empty(0)
        self.home, self.work = exchange(
            self.outgoing, self.messages.received, self.messages.sent, self.placement.group, wait=False
        )

    def gradients(self) -> list[tuple[int, Tensor]]:
        """The held layers' gradients of the rows computed here, summed over the ranks, fp32."""
        self.work.wait()
        self.work, self.outgoing = None, torch.empty(0)
        sizes = self.messages.sizes
        total = torch.zeros(sum(sizes), self.home.shape[1], device=self.device)
        add_rows(total, self.index, self.home)
        self.home = torch.empty(0)
        return list(zip(self.messages.held, total.split(sizes), strict=True))


@dataclass(frozen=True)
class OwnedPlan(TablePlan):
    """A step's owned rows, on the CPU. messages: of each exchange; computed: by layer, which of the needed
    ids' rows this rank computes; passes: micro-batches.
    """

    messages: Sequence[Messages] = ()
    computed: Mapping[int, Tensor] = field(default_factory=dict)
    passes: int = 0


class OwnedTables(TableSource):
    """A memory source of one step's rows, computed by their owners.

    blocks: of the layers with a table; those not owned here have no FFN-M. row_bytes: of one row.
    """

    tensor_sliced = False

    def __init__(
        self,
        blocks: Mapping[int, MemoryBlock],
        tensor: TensorGroup,
        precision: torch.autocast,
        placement: Placement,
        other_layers: UniqueSource | None,
        kept_layers: int,
        device: torch.device,
        row_bytes: int,
    ) -> None:
        super().__init__(blocks, tensor, precision, None, other_layers, 0, device)
        self.tensor, self.placement, self.device = tensor, placement, device
        self.held = placement.owners.held(placement.rank)
        self.kept_layers = set(self.held[:kept_layers])
        self.groups: list[RowGroup] = []
        self.rows_of: dict[int, StepRows] = {}
        self.computed, self.needed, self.hidden = 0, 0, 0
        self.row_bytes = row_bytes
        self.parts: list[tuple[Tensor, StepRows]] = []
        self.group_of: dict[int, RowGroup] = {}
        self.to_send: list[RowGroup] = []

    def plan(self, ids: Tensor, distinct: Tensor, passes: int, ahead: bool = False) -> OwnedPlan:
        """Tell the owners the step's ids, and plan what follows of those of all ranks."""
        split = self.positions.shards > 1
        mine = here = self.positions.local(ids, 1).unique() if split else distinct
        if not split:  # the tensor-parallel ranks ask for as many each
            each = -(-len(here) // self.tensor.size)
            mine = here[self.tensor.rank * each :][:each]
            mine = torch.cat((mine, here[-1:].expand(each - len(mine))))
        asked = Asked.of(mine, self.placement, ahead)
        messages = [Messages.of(layers, asked, self.placement) for layers in self._grouped(asked)]
        return OwnedPlan(here, asked.needed, None, messages, asked.computed, passes)

    def begin(self, plan: OwnedPlan, rows: Tensor) -> None:  # type: ignore[override]
        """Compute the rows of the layers owned here, and send them. rows: x0 of the needed ids, fp32."""
        with self.precision:
            dtype = compute_dtype(rows)
        self.ids = plan.ids.to(self.device, non_blocking=True)
        self.needed, self.hidden = rows.shape
        for group in self.groups:
            group.arrive()  # layers of alpha 0 read nothing in an evaluation
        self.parts, self.rows_of, whole = [], {}, None
        for layer in self.held:
            if layer not in self.placement.owners.layers[: self.placement.owners.whole]:
                self.rows_of[layer] = self._rows(rows, plan.computed[layer])
            else:
                whole = whole or self._rows(rows, plan.computed[layer])
                self.rows_of[layer] = whole
        self.computed = sum(self.rows_of[layer].count for layer in self.held)
        training = torch.is_grad_enabled()
        self.groups = []
        for messages in plan.messages:
            group = RowGroup(messages, self.placement, self.tensor, self.device)
            tables = [self._table(layer, training) for layer in messages.held]
            group.send(tables, dtype, rows.shape[1], plan.passes if training else 0)
            self.groups.append(group)
        self.group_of = {layer: group for group in self.groups for layer in group.layers}
        self.to_send = list(self.groups) if training else []

    def _rows(self, rows: Tensor, index: Tensor) -> StepRows:
        """The x0 of `index` of the needed rows, to compute from; all of them for a whole layer."""
        index = index.to(self.device, non_blocking=True)
        every = len(index) == len(rows)
        step_rows = StepRows(rows if every else rows[index], Positions(), self.precision)
        self.parts.append((index, step_rows))
        return step_rows

    def _table(self, layer: int, training: bool) -> Tensor:
        rows, block = self.rows_of[layer], self.blocks[layer]
        return rows.table_with_graph(block) if training and layer in self.kept_layers else rows.table(block)

    def _grouped(self, asked: Asked) -> list[list[int]]:
        """The layers of each exchange, equal on all ranks: rounds of owners, fused while small."""
        rounds = self.placement.owners.rounds()
        mean = sum(map(len, asked.by_rank)) / self.placement.owners.ranks
        total = mean * len(self.blocks) * self.row_bytes
        exchanges = min(len(rounds), max(1, ceil(total / GROUP_BYTES)))
        bounds = [len(rounds) * i // exchanges for i in range(exchanges + 1)]
        return [[layer for layers in rounds[low:high] for layer in layers] for low, high in pairwise(bounds)]

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids int64 [batch, sequence], of this step's; x0 is used for layers without a table only."""
        index = torch.searchsorted(self.ids, self.positions.local(ids, 1).contiguous())
        read_other: MemoryReader = no_layer if self.other_layers is None else self.other_layers.open(ids, x0)

        def read(layer: int) -> Tensor:
            if layer not in self.blocks:
                return read_other(layer)
            group = self.group_of[layer]
            group.arrive()
            at, done = group.places_of(layer)[index], partial(self._done, group)
            return Lookup.apply(at, group.rows, group.gradient, self.anchors[layer], done)

        return read

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of the latest step on this rank alone, rows times layers."""
        others = 0
        if self.other_layers is not None and self.tensor.rank == 0:
            others = self.other_layers.evaluations(tokens, distinct)
        return self.computed + others

    def _done(self, group: RowGroup) -> None:
        """After a lookup's backward: send a group's gradients once it is the last; deepest layers first."""
        group.reads -= 1
        while self.to_send and self.to_send[-1].reads == 0:
            self.to_send.pop().send_home()

    def finish(self) -> Tensor:
        """Run FFN-M's backward of the layers owned here; the gradient of `begin`'s rows, this rank's part."""
        while self.to_send:
            group = self.to_send.pop()
            group.arrive()
            group.send_home()
        for group in reversed(self.groups):
            for layer, gradient in group.gradients():
                block = self.blocks[layer]
                self.rows_of[layer].backward(block, gradient, partial(_collect, block))
        total = torch.zeros(self.needed, self.hidden, device=self.device)
        for index, rows in self.parts:
            total.index_add_(0, index, rows.take_gradient())
        self.rows_of, self.parts = {}, []
        return total


def _collect(block: MemoryBlock) -> None:
    """Add gradients of bf16 weights into fp32 sums, `main_grad`, as Megatron-LM does."""
    for module in (block.memory_layernorm, block.memory_mlp):
        for parameter in module.parameters():
            if parameter.dtype == torch.float32 or parameter.grad is None:
                continue
            total = getattr(parameter, "main_grad", None)
            gradient = parameter.grad.float()
            parameter.main_grad = gradient if total is None else total.add_(gradient)  # type: ignore[attr-defined]
            parameter.grad = None
