"""Collectives of a tensor-parallel group, each with its transpose as the backward pass.

Without sequence parallelism activations outside the sharded matmuls are replicated: a column-parallel matmul
takes them as they are, a row-parallel one is followed by an all-reduce (arXiv 1909.08053). With it each rank
holds its positions there: they are all-gathered before the former and reduce-scattered after the latter
(arXiv 2205.05198).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from mlm_train.model.linear import compute_dtype
from mlm_train.model.logical import Part
from mlm_train.model.source import Positions

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class TensorGroup(Positions):
    """The ranks that shard each layer. `handle`: torch's process group, None where only shapes are wanted.

    `sequence`: whether activations outside the sharded matmuls are split along the sequence, the last but one
    dimension of [..., positions, hidden].
    """

    size: int
    rank: int
    handle: Any = None
    sequence: bool = False

    def part(self, name: str | None, dim: int, start: int, total: int) -> Part:
        """This rank's shard of `total` indices along `dim`, at index `start` of the local weight."""
        size = self.shard_size(total)
        offset = min(self.rank * size, total)
        return Part(name, dim, start, min(size, total - offset), offset, total)

    def shard_size(self, total: int) -> int:
        """Indices per rank of a dimension of size `total`, padding included."""
        return -(-total // self.size)

    def enter(self, x: Tensor) -> Tensor:
        """Before a column-parallel matmul: x [..., local positions, hidden] -> [..., positions, hidden].

        In the dtype of the matmul, so that bf16 travels.
        """
        x = x.to(compute_dtype(x))
        return self.gather(x) if self.sequence else _LinearMap.apply(x, _identity, self.all_reduce)

    def leave(self, x: Tensor) -> Tensor:
        """After a row-parallel matmul: partial [..., positions, hidden] -> [..., local positions, hidden]."""
        if self.sequence:
            return _LinearMap.apply(x, self.reduce_scatter, self.all_gather)
        return self.sum(x)

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce; the gradient, which is the same on all ranks, passes unchanged."""
        return _LinearMap.apply(x, self.all_reduce, _identity)

    @property
    def shards(self) -> int:  # type: ignore[override]
        """Ranks that the positions outside the sharded matmuls are split over."""
        return self.size if self.sequence else 1

    def gather(self, x: Tensor) -> Tensor:
        """x [..., local positions, hidden] -> [..., positions, hidden]; the backward reduce-scatters."""
        return _LinearMap.apply(x, self.all_gather, self.reduce_scatter) if self.sequence else x

    def local(self, x: Tensor, dim: int) -> Tensor:
        """This rank's positions along `dim`; all of them without sequence parallelism."""
        return x.chunk(self.size, dim)[self.rank] if self.sequence else x

    # In a compiled graph collectives are functional: there torch 2.11 drops the gradient of one in place.

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """The sum or maximum over the ranks, a new tensor without gradient."""
        if torch.compiler.is_compiling():
            return functional.all_reduce(x, op, self.handle)
        x = x.clone(memory_format=torch.contiguous_format)  # all_reduce writes in place
        dist.all_reduce(x, REDUCE_OPS[op], group=self.handle)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [..., n, hidden] -> [..., n * size, hidden], in the order of ranks."""
        if torch.compiler.is_compiling():
            out = functional.all_gather_tensor(x.contiguous(), 0, self.handle)
        else:
            out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
            dist.all_gather_into_tensor(out, x.contiguous(), group=self.handle)
        return out.unflatten(0, (self.size, -1)).movedim(0, -3).flatten(-3, -2)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """x [..., n * size, hidden] -> this rank's [..., n, hidden] of the sum over ranks."""
        shards = x.unflatten(-2, (self.size, -1)).movedim(-3, 0).contiguous()
        if torch.compiler.is_compiling():
            return functional.reduce_scatter_tensor(shards.flatten(0, 1), "sum", 0, self.handle)
        out = x.new_empty(shards.shape[1:])  # empty_like would keep odd strides of a dimension of size 1
        dist.reduce_scatter_tensor(out, shards.flatten(0, 1), group=self.handle)
        return out


Map = Callable[[Tensor], Tensor]


class _LinearMap(torch.autograd.Function):
    """A linear map between ranks; its backward is the given transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Map, backward: Map) -> Tensor:
        ctx.transpose = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grad), None, None


def _identity(x: Tensor) -> Tensor:
    return x.view_as(x)
