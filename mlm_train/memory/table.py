"""FFN-M once per distinct token of a step: tables before the micro-batches, one backward pass after them.

FFN_M(N_m(x0)) depends on the token id alone, so one row a distinct id serves every position of every
micro-batch of the step. The tables are computed without a graph; a lookup's backward adds into an fp32
gradient table of the same shape; at the end of the step FFN-M runs once more, with a graph, and takes the
summed gradient. Where there is memory, the graph of its first run waits for it instead. Exact: the sum over
positions is taken before a linear map instead of after it.
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

ROWS = 4096  # of a block, at most; of fewer than about 1,500 products run at half the speed here


class RowSharing:
    """Which rows of a step's tables this process computes: those of its own ids.

    parallel/ffn_m/shares.py has one that splits all data-parallel ranks' rows over them.
    """

    def begin(self, ids: Tensor) -> Tensor:
        """The distinct ids of a step here, int64 [distinct], sorted -> those to compute here [share]."""
        return ids

    def spread(self, rows: Tensor) -> Tensor:
        """Rows computed here [share, hidden] -> those of this process's own ids [distinct, hidden]."""
        return rows

    def collect(self, rows: Tensor) -> Tensor:
        """The transpose: gradients of own ids' rows -> of the rows computed here, all users' sum."""
        return rows


class TableSource:
    """A memory source of one step's rows: begin, any number of micro-batches, finish.

    `rest`: the source of layers that have no table. `kept`: layers, the first ones, whose activations wait
    from begin for finish; the others compute them again there.
    """

    def __init__(
        self,
        blocks: Mapping[int, MemoryBlock],
        positions: Positions | None = None,
        precision: torch.autocast | None = None,
        share: RowSharing | None = None,
        rest: UniqueSource | None = None,
        kept: int = 0,
    ) -> None:
        self.blocks, self.positions, self.rest = blocks, positions or Positions(), rest
        self.share = share or RowSharing()
        self.precision = precision or torch.autocast("cpu", enabled=False)
        self.anchors = {
            layer: nn.Parameter(block.memory_layernorm.weight.new_zeros(1)) for layer, block in blocks.items()
        }
        self.keeping = set(list(blocks)[:kept])
        self.tables: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.passes: dict[int, list[Tensor]] = {}
        self.computed = 0  # rows of each of the latest step's tables that this process computes

    def begin(self, ids: Tensor, rows: Tensor) -> None:
        """Tables of a step. ids int64 [distinct], sorted: the distinct ones here.

        rows: embeddings of share.begin(ids), fp32 [share, hidden]. Under no_grad lookups have no gradients.
        """
        training = torch.is_grad_enabled()
        self.ids, self.computed = ids, len(rows)
        # One block at least: with no row here the weights still get their zero gradients, as on other ranks.
        self.rows = [some.detach().requires_grad_(training) for some in _blocks(rows)]
        for layer, block in self.blocks.items():
            if training and layer in self.keeping:
                table = self._kept_table(layer, block)
            else:
                table = self._table(block)
            self.tables[layer] = self.share.spread(table)
            self.gradients[layer] = rows.new_zeros(len(ids) if training else 0, rows.shape[1])

    @torch.no_grad()
    def _table(self, block: MemoryBlock) -> Tensor:
        """In the dtype of FFN-M's products."""
        return torch.cat([self._whole(self._ffn_m(block, some), len(some)) for some in self.rows])

    def _kept_table(self, layer: int, block: MemoryBlock) -> Tensor:
        """The same; its graph waits for `finish`."""
        self.passes[layer] = [self._pass(block, some) for some in self.rows]
        with self.precision:
            element = compute_dtype(self.rows[0])
        return torch.cat([memory.detach().to(element) for memory in self.passes[layer]])

    def _pass(self, block: MemoryBlock, rows: Tensor) -> Tensor:
        """FFN-M of a block of rows, with a graph; fp32, as ranks that share the positions sum gradients."""
        return self._whole(self._ffn_m(block, rows).to(rows.dtype), len(rows))

    def _ffn_m(self, block: MemoryBlock, rows: Tensor) -> Tensor:
        """FFN-M of some rows; where positions are cut over ranks each computes its share."""
        rows = F.pad(rows, (0, 0, 0, -len(rows) % self.positions.positions))
        with self.precision:
            return block.ffn_m(self.positions.mine(rows, 0))

    def _whole(self, memory: Tensor, count: int) -> Tensor:
        return self.positions.whole(memory)[:count]

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids int64 [batch, sequence], among the step's; x0 is read for the layers without a table."""
        index = torch.searchsorted(self.ids, self.positions.mine(ids, 1).contiguous())
        others: MemoryReader = self.rest.open(ids, x0) if self.rest is not None else _no_layer

        def read(layer: int) -> Tensor:
            if layer not in self.tables:
                return others(layer)
            return Lookup.apply(index, self.tables[layer], self.gradients[layer], self.anchors[layer])

        return read

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of the latest step, rows times layers; what `finish` runs again is not counted.

        tokens, distinct: positions, and ids summed over micro-batches, for the layers without a table.
        """
        others = self.rest.evaluations(tokens, distinct) if self.rest is not None else 0
        return len(self.blocks) * self.computed + others

    def finish(self) -> Tensor:
        """FFN-M's backward, once a layer; the gradient of the rows given to `begin`, fp32 [share, hidden].

        Where positions are cut over ranks, the ranks' sum is.
        """
        self.tables.clear()
        for layer, block in self.blocks.items():
            gradient = _blocks(self.share.collect(self.gradients.pop(layer)))
            again = (self._pass(block, some) for some in self.rows)  # one at a time
            for memory, part in zip(self.passes.pop(layer, again), gradient, strict=True):
                memory.backward(part)
        rows, self.rows = self.rows, []
        return torch.cat([torch.zeros_like(some) if some.grad is None else some.grad for some in rows])


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Of equal size, as a small one would run at half the speed; one at least."""
    return rows.tensor_split(max(1, ceil(len(rows) / ROWS)))


def _no_layer(layer: int) -> Tensor:
    raise KeyError(f"no table of layer {layer}")
