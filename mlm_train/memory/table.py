"""FFN-M once per distinct token of a step: tables before the micro-batches, one backward pass after them.

FFN_M(N_m(x0)) depends on the token id alone, so one row per distinct id serves every position of every
micro-batch of the step. The tables are computed without a graph; a lookup's backward adds into an fp32
gradient table of the same shape; at the end of the step FFN-M runs again, with a graph, and backpropagates
the summed gradient. Layers whose activations fit in memory keep the graph of the first run instead. Exact:
the sum over positions is taken before a linear map instead of after it.
"""

from collections.abc import Mapping
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.memory.rows import Lookup
from mlm_train.memory.unique import UniqueSource
from mlm_train.model.block import MemoryBlock
from mlm_train.model.linear import compute_dtype
from mlm_train.model.source import MemoryReader, Positions

BLOCK_ROWS = 4096  # at most; matmuls of fewer than about 1,500 rows run at half the speed on a CPU


class RowSharing:
    """Which rows of a step's tables this rank computes: those of its own ids.

    parallel/ffn_m/shares.py has the subclass that splits the rows of all data-parallel ranks over them.
    """

    def begin(self, ids: Tensor) -> Tensor:
        """The step's distinct ids here, int64 [distinct], sorted -> the ids to compute here [share]."""
        return ids

    def spread(self, rows: Tensor) -> Tensor:
        """Rows computed here [share, hidden] -> rows of this rank's own ids [distinct, hidden]."""
        return rows

    def collect(self, rows: Tensor) -> Tensor:
        """Transpose of spread: gradients of own ids' rows -> of the rows computed here, summed over ranks."""
        return rows


class TableSource:
    """A memory source of one step's rows: begin, any number of micro-batches, finish.

    `other_layers`: the source of layers without a table. `kept_layers`: how many layers, the first ones, keep
    their activations from begin to finish; the others recompute them there.
    """

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
        self.kept_outputs: dict[int, list[Tensor]] = {}  # of kept layers, with their graphs
        self.computed_rows = 0  # per table of the latest step, on this rank

    def begin(self, ids: Tensor, rows: Tensor) -> None:
        """Compute the tables of a step. ids int64 [distinct]: the step's distinct ids on this rank, sorted.

        rows: embeddings of share.begin(ids), fp32 [share, hidden]. Under no_grad lookups have no gradients.
        """
        training = torch.is_grad_enabled()
        self.ids, self.computed_rows = ids, len(rows)
        # At least one block: without rows the weights still need zero gradients, as on other ranks.
        self.rows = [block_rows.detach().requires_grad_(training) for block_rows in _blocks(rows)]
        for layer, block in self.blocks.items():
            if training and layer in self.kept_layers:
                table = self._table_with_graph(layer, block)
            else:
                table = self._table(block)
            self.tables[layer] = self.share.spread(table)
            self.gradients[layer] = rows.new_zeros(len(ids) if training else 0, rows.shape[1])

    @torch.no_grad()
    def _table(self, block: MemoryBlock) -> Tensor:
        """A layer's table [share, hidden], in the dtype of FFN-M's matmuls."""
        return torch.cat([self._gather(self._ffn_m(block, rows), len(rows)) for rows in self.rows])

    def _table_with_graph(self, layer: int, block: MemoryBlock) -> Tensor:
        """The same; the graph is kept for `finish`."""
        self.kept_outputs[layer] = [self._forward(block, rows) for rows in self.rows]
        with self.precision:
            dtype = compute_dtype(self.rows[0])
        return torch.cat([memory.detach().to(dtype) for memory in self.kept_outputs[layer]])

    def _forward(self, block: MemoryBlock, rows: Tensor) -> Tensor:
        """FFN-M of a block of rows, with a graph; fp32, for the sum of gradients over ranks."""
        return self._gather(self._ffn_m(block, rows).to(rows.dtype), len(rows))

    def _ffn_m(self, block: MemoryBlock, rows: Tensor) -> Tensor:
        """FFN-M of rows, or of this rank's part of them where positions are split over ranks."""
        rows = F.pad(rows, (0, 0, 0, -len(rows) % self.positions.shards))
        with self.precision:
            return block.ffn_m(self.positions.local(rows, 0))

    def _gather(self, memory: Tensor, count: int) -> Tensor:
        return self.positions.gather(memory)[:count]

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids int64 [batch, sequence], of this step's; x0 is used for layers without a table only."""
        index = torch.searchsorted(self.ids, self.positions.local(ids, 1).contiguous())
        read_other: MemoryReader = _no_layer if self.other_layers is None else self.other_layers.open(ids, x0)

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
        return len(self.blocks) * self.computed_rows + others

    def finish(self) -> Tensor:
        """Run FFN-M's backward, once per layer; the gradient of `begin`'s rows, fp32 [share, hidden].

        Where positions are split over ranks, the gradient is the sum of the ranks' results.
        """
        self.tables.clear()
        for layer, block in self.blocks.items():
            gradients = _blocks(self.share.collect(self.gradients.pop(layer)))
            recomputed = (self._forward(block, rows) for rows in self.rows)  # one graph at a time
            for memory, gradient in zip(self.kept_outputs.pop(layer, recomputed), gradients, strict=True):
                memory.backward(gradient)
        blocks, self.rows = self.rows, []
        return torch.cat([torch.zeros_like(rows) if rows.grad is None else rows.grad for rows in blocks])


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Split rows into blocks of equal size, since a small one would run at half the speed; at least one."""
    return rows.tensor_split(max(1, ceil(len(rows) / BLOCK_ROWS)))


def _no_layer(layer: int) -> Tensor:
    raise KeyError(f"no table of layer {layer}")
