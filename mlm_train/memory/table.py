"""FFN-M once per distinct token of a step: tables before the micro-batches, one backward pass after them.

FFN_M(N_m(x0)) depends on the token id alone, so one row per distinct id serves every position of every
micro-batch of the step. The tables are computed without a graph; a lookup's backward adds into an fp32
gradient table of the same shape; at the end of the step FFN-M runs again, with a graph, and backpropagates
the summed gradient. Layers whose activations fit in memory keep the graph of the first run instead. Exact:
the sum over positions is taken before a linear map instead of after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlm_train.memory.rows import Lookup
from mlm_train.memory.step_rows import StepRows
from mlm_train.memory.unique import UniqueSource
from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemoryReader, Positions


class RowSharing:
    """Which rows of a step's tables this rank computes: those of its own ids.

    parallel/ffn_m/shares.py has the subclass that splits the rows of all data-parallel ranks over them.
    """

    def plan(self, ids: Tensor, ahead: bool) -> tuple[Tensor, Any]:
        """The step's distinct ids here, int64 [distinct], sorted -> those to compute here [share], and what
        `begin` takes. On the CPU; `ahead`: of a later step, by the data thread.
        """
        return ids, None

    def begin(self, plan: Any) -> None:
        """Before the step's rows are spread."""

    def spread(self, rows: Tensor) -> Tensor:
        """Rows computed here [share, hidden] -> rows of this rank's own ids [distinct, hidden]."""
        return rows

    def collect(self, rows: Tensor) -> Tensor:
        """Transpose of spread: gradients of own ids' rows -> of the rows computed here, summed over ranks."""
        return rows


@dataclass(frozen=True)
class TablePlan:
    """A step's tables, planned on the CPU.

    ids: the step's distinct ids on this rank, sorted; needed: those whose x0 `begin` takes; sharing: of
    RowSharing.
    """

    ids: Tensor
    needed: Tensor
    sharing: Any = None


class TableSource:
    """A memory source of one step's rows: plan, begin, any number of micro-batches, finish.

    `other_layers`: the source of layers without a table. `kept_layers`: how many layers, the first ones, keep
    their activations from begin to finish; the others recompute them there.
    """

    tensor_sliced = True  # tensor-parallel ranks share each evaluation

    def __init__(
        self,
        blocks: Mapping[int, MemoryBlock],
        positions: Positions | None = None,
        precision: torch.autocast | None = None,
        share: RowSharing | None = None,
        other_layers: UniqueSource | None = None,
        kept_layers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.blocks, self.positions = blocks, positions or Positions()
        self.other_layers = other_layers
        self.share = share or RowSharing()
        self.precision = precision or torch.autocast("cpu", enabled=False)
        self.anchors = {
            layer: nn.Parameter(torch.zeros(1, device=device or block.memory_layernorm.weight.device))
            for layer, block in blocks.items()
        }
        self.kept_layers = set(list(blocks)[:kept_layers])
        self.tables: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}

    def plan(self, ids: Tensor, distinct: Tensor, passes: int, ahead: bool = False) -> TablePlan:
        """Plan a step, on the CPU. ids int64 [..., sequence], of all positions; distinct: those, sorted;
        passes: micro-batches; ahead: of a later step, by the data thread.
        """
        return TablePlan(distinct, *self.share.plan(distinct, ahead))

    def begin(self, plan: TablePlan, rows: Tensor) -> None:
        """Compute the tables of a step. rows: x0 of the needed ids, fp32 [share, hidden].

        Under no_grad lookups have no gradients.
        """
        training = torch.is_grad_enabled()
        self.ids = ids = plan.ids.to(rows.device, non_blocking=True)
        self.share.begin(plan.sharing)
        self.rows = StepRows(rows, self.positions, self.precision)
        for layer, block in self.blocks.items():
            keeps = training and layer in self.kept_layers
            table = self.rows.table_with_graph(block) if keeps else self.rows.table(block)
            self.tables[layer] = self.share.spread(table)
            self.gradients[layer] = rows.new_zeros(len(ids) if training else 0, rows.shape[1])

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids int64 [batch, sequence], of this step's; x0 is used for layers without a table only."""
        index = torch.searchsorted(self.ids, self.positions.local(ids, 1).contiguous())
        read_other: MemoryReader = no_layer if self.other_layers is None else self.other_layers.open(ids, x0)

        def read(layer: int) -> Tensor:
            if layer not in self.tables:
                return read_other(layer)
            return Lookup.apply(index, self.tables[layer], self.gradients[layer], self.anchors[layer])

        return read

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of the latest step, rows times layers, without the recomputation in `finish`.

        For layers without a table, tokens: positions; distinct: distinct ids, summed over micro-batches.
        """
        others = 0 if self.other_layers is None else self.other_layers.evaluations(tokens, distinct)
        return len(self.blocks) * self.rows.count + others

    def finish(self) -> Tensor:
        """Run FFN-M's backward, once per layer; the gradient of `begin`'s rows, fp32 [share, hidden].

        Where positions are split over ranks, the gradient is the sum of the ranks' results.
        """
        self.tables.clear()
        for layer, block in self.blocks.items():
            self.rows.backward(block, self.share.collect(self.gradients.pop(layer)))
        return self.rows.take_gradient()


def no_layer(layer: int) -> Tensor:
    """Reads nothing, where every layer has a table."""
    raise KeyError(f"no table of layer {layer}")
