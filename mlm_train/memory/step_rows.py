"""FFN-M of a step's rows: forward before the micro-batches, backward after them."""

from collections.abc import Callable
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_train.model.block import MemoryBlock
from mlm_train.model.linear import compute_dtype
from mlm_train.model.source import Positions

BLOCK_ROWS = 4096  # at most; matmuls of fewer than about 1,500 rows run at half the speed on a CPU


class StepRows:
    """x0 of distinct ids, fp32 [rows, hidden], of which layers compute FFN-M; it sums up the gradient of x0.

    Where positions are split over ranks, so are the rows, and the gradient is the sum of the ranks' results.
    """

    def __init__(self, rows: Tensor, positions: Positions, precision: torch.autocast) -> None:
        self.positions, self.precision, self.count = positions, precision, len(rows)
        training = torch.is_grad_enabled()
        # At least one block: without rows the weights still need zero gradients, as on other ranks.
        self.blocks = [block.detach().requires_grad_(training) for block in _blocks(rows)]
        self.kept: dict[int, list[Tensor]] = {}  # outputs by layer, with their graphs

    @torch.no_grad()
    def table(self, block: MemoryBlock) -> Tensor:
        """A layer's table [rows, hidden], in the dtype of FFN-M's matmuls."""
        return torch.cat([self._gather(self._ffn_m(block, rows), len(rows)) for rows in self.blocks])

    def table_with_graph(self, block: MemoryBlock) -> Tensor:
        """The same; the graph is kept for `backward`."""
        self.kept[block.layer] = [self._forward(block, rows) for rows in self.blocks]
        with self.precision:
            dtype = compute_dtype(self.blocks[0])
        return torch.cat([memory.detach().to(dtype) for memory in self.kept[block.layer]])

    def backward(
        self, block: MemoryBlock, gradient: Tensor, after_block: Callable[[], None] | None = None
    ) -> None:
        """Backpropagate a layer's gradient, fp32 [rows, hidden]; `after_block` is called after each part."""
        recomputed = (self._forward(block, rows) for rows in self.blocks)  # one graph at a time
        for memory, part in zip(self.kept.pop(block.layer, recomputed), _blocks(gradient), strict=True):
            memory.backward(part)
            if after_block is not None:
                after_block()

    def take_gradient(self) -> Tensor:
        """That of x0, after the layers' backward, fp32 [rows, hidden]; x0 is dropped."""
        blocks, self.blocks = self.blocks, []
        return torch.cat([torch.zeros_like(rows) if rows.grad is None else rows.grad for rows in blocks])

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


def _blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Split rows into blocks of equal size, since a small one would run at half the speed; at least one."""
    return rows.tensor_split(max(1, ceil(len(rows) / BLOCK_ROWS)))
