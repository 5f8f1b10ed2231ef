"""FFN-M once per distinct token of a step: tables before the micro-batches, one backward pass after them.

FFN_M(N_m(x0)) depends on the token id alone, so one row a distinct id serves every position of every
micro-batch of the step. The tables are computed without a graph; a lookup's backward adds into an fp32
gradient table of the same shape; at the end of the step FFN-M runs once more, with a graph, and takes the
summed gradient. Exact: the sum over positions is taken before a linear map instead of after it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.memory.rows import add_rows
from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemoryReader, Positions

ROWS = 2048  # of a block: large enough for full speed, small enough to stay near the processor


class Lookup(torch.autograd.Function):
    """rows[index]; the backward adds into `gradient`, and gives the anchor zeros.

    Zero-bubble schedules run a backward only where a parameter of the stage hangs on it: each lookup has
    an anchor of its own, shape [1], which is in no optimizer and no checkpoint.
    """

    @staticmethod
    def forward(ctx: Any, index: Tensor, rows: Tensor, gradient: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.gradient = gradient
        return rows[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        (index,) = ctx.saved_tensors
        add_rows(ctx.gradient, index.reshape(-1), grad.reshape(-1, grad.shape[-1]))
        return None, None, None, grad.new_zeros(1)


class Table:
    """A memory source of one step's rows: begin, any number of micro-batches, finish."""

    def __init__(
        self, blocks: Mapping[int, MemoryBlock], positions: Positions, precision: torch.autocast
    ) -> None:
        self.blocks, self.positions, self.precision = blocks, positions, precision
        self.anchors = {
            layer: nn.Parameter(block.memory_layernorm.weight.new_zeros(1)) for layer, block in blocks.items()
        }
        self.tables: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}

    @torch.no_grad()
    def begin(self, ids: Tensor, rows: Tensor) -> None:
        """Tables of a step: ids int64 [distinct], sorted; rows their embeddings, fp32 [distinct, hidden]."""
        self.ids, self.rows = ids, rows.detach()
        self.tables = {layer: self._table(block) for layer, block in self.blocks.items()}
        self.gradients = {layer: torch.zeros_like(self.rows) for layer in self.blocks}

    def _table(self, block: MemoryBlock) -> Tensor:
        return torch.cat([self._rows(block, some) for some in self.rows.split(ROWS)])

    def _rows(self, block: MemoryBlock, rows: Tensor) -> Tensor:
        """FFN-M of some rows; where positions are cut over ranks each computes its share."""
        count = len(rows)
        rows = F.pad(rows, (0, 0, 0, -count % self.positions.positions))
        with self.precision:
            memory = block.ffn_m(self.positions.mine(rows, 0))
        return self.positions.whole(memory.to(rows.dtype))[:count]

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids int64 [batch, sequence], among the step's; x0 is not read."""
        index = torch.searchsorted(self.ids, self.positions.mine(ids, 1).contiguous())

        def read(layer: int) -> Tensor:
            return Lookup.apply(index, self.tables[layer], self.gradients[layer], self.anchors[layer])

        return read

    def finish(self) -> Tensor:
        """FFN-M's backward, once a layer; the gradient of the rows [distinct, hidden], fp32.

        Where positions are cut over ranks, the ranks' sum is.
        """
        total = torch.zeros_like(self.rows)
        for layer, block in self.blocks.items():
            gradient = self.gradients.pop(layer)
            for start in range(0, len(self.rows), ROWS):
                some = slice(start, start + ROWS)
                x0 = self.rows[some].clone().requires_grad_()
                self._rows(block, x0).backward(gradient[some])
                assert x0.grad is not None
                total[some] += x0.grad
        self.tables.clear()
        return total
