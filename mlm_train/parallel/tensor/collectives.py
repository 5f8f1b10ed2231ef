"""What travels between the ranks of a tensor-parallel group, with its transpose for the backward pass.

Without sequence parallelism activations outside the cut products are alike on all ranks: they are
copied into a product and summed out of it (arXiv 1909.08053). With it each rank holds its share of the
positions there: shares are gathered into a product and reduce-scattered out of it (arXiv 2205.05198).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.model.logical import Part
from mlm_train.model.source import Positions


@dataclass(frozen=True)
class TensorGroup(Positions):
    """The ranks that share each layer. `handle` is None where only shapes are wanted.

    `sequence`: whether activations outside the products are cut along the sequence, which is the last
    but one dimension of [..., positions, hidden].
    """

    size: int
    rank: int
    handle: Any = None
    sequence: bool = False

    def part(self, name: str | None, dim: int, start: int, total: int) -> Part:
        """This rank's share of `total` indices, at `start` of the local weight."""
        share = self.share(total)
        offset = min(self.rank * share, total)
        return Part(name, dim, start, min(share, total - offset), offset, total)

    def share(self, total: int) -> int:
        """Indices a rank holds, padding included."""
        return -(-total // self.size)

    def enter(self, x: Tensor) -> Tensor:
        """Before a product cut by column: x [..., positions here, hidden] -> all positions."""
        return self.whole(x) if self.sequence else _Mapped.apply(x, _same, self.all_reduce)

    def leave(self, x: Tensor) -> Tensor:
        """After a product cut by row: a part of the sum [..., positions, hidden] -> x as outside."""
        if self.sequence:
            return _Mapped.apply(x, self.reduce_scatter, self.all_gather)
        return self.sum(x)

    def sum(self, x: Tensor) -> Tensor:
        """The ranks' sum, alike on all; its gradient, alike on all too, passes unchanged."""
        return _Mapped.apply(x, self.all_reduce, _same)

    @property
    def positions(self) -> int:  # type: ignore[override]
        """Ranks that the positions outside the products are cut over."""
        return self.size if self.sequence else 1

    def whole(self, x: Tensor) -> Tensor:
        """x [..., positions here, hidden] -> all positions, whose gradients the ranks then sum."""
        return _Mapped.apply(x, self.all_gather, self.reduce_scatter) if self.sequence else x

    def mine(self, x: Tensor, dim: int) -> Tensor:
        """This rank's positions along `dim`; all of them without sequence parallelism."""
        return x.chunk(self.size, dim)[self.rank] if self.sequence else x

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The ranks' sum or maximum, as a new tensor without gradient."""
        x = x.clone(memory_format=torch.contiguous_format)  # all_reduce writes in place
        dist.all_reduce(x, op=op, group=self.handle)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[..., n, hidden] of each rank -> [..., n * size, hidden], in the order of ranks."""
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=self.handle)
        return out.unflatten(0, (self.size, -1)).movedim(0, -3).flatten(-3, -2)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[..., n * size, hidden] of each rank -> this rank's n of the sum."""
        shares = x.unflatten(-2, (self.size, -1)).movedim(-3, 0).contiguous()
        out = torch.empty_like(shares[0])
        dist.reduce_scatter_tensor(out, shares.flatten(0, 1), group=self.handle)
        return out


Map = Callable[[Tensor], Tensor]


class _Mapped(torch.autograd.Function):
    """A linear map between ranks, with its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Map, backward: Map) -> Tensor:
        ctx.transpose = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grad), None, None


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)
