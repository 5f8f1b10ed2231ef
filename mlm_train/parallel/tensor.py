"""Tensor parallelism: each layer's products cut over the ranks of a group (Megatron-LM, arXiv 1909.08053).

`shard` replaces the linears, the embedding and the head of a plain Transformer; the model's own code
does not change. Dimensions that the group's size does not divide are padded with zeros at run time,
which is exact: a padded key of an FFN gives 0 and gets no gradient, padded words are masked out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.model.attention import Attention
from mlm_train.model.linear import FusedLinear
from mlm_train.model.logical import Part
from mlm_train.model.loss import Words
from mlm_train.model.transformer import Transformer


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share each layer. `handle` is None where only shapes are wanted."""

    size: int
    rank: int
    handle: Any = None

    def part(self, name: str | None, dim: int, start: int, total: int) -> Part:
        """This rank's share of `total` indices, at `start` of the local weight."""
        share = self.share(total)
        offset = min(self.rank * share, total)
        return Part(name, dim, start, min(share, total - offset), offset, total)

    def share(self, total: int) -> int:
        """Indices a rank holds, padding included."""
        return -(-total // self.size)


class _Enter(torch.autograd.Function):
    """Before a column product: identity forward, sum of the ranks' gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    """After a row product: sum of the ranks' parts forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _sum(x: Tensor, group: TensorGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)  # all_reduce writes in place
    dist.all_reduce(x, group=group.handle)
    return x


class ColumnLinear(nn.Module):
    """Products of one input with the output cut: y_r = x W_r^T. Fused like FusedLinear."""

    def __init__(
        self, in_features: int, parts: Mapping[str, int] | Mapping[None, int], group: TensorGroup
    ) -> None:
        super().__init__()
        self.parts, self.group = parts, group
        self.weight = nn.Parameter(torch.empty(sum(map(group.share, parts.values())), in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], alike on all ranks -> [..., this rank's out]."""
        return F.linear(_Enter.apply(x, self.group), self.weight)

    def logical_parts(self) -> list[Part]:
        """One part a product."""
        found, start = [], 0
        for name, total in self.parts.items():
            found.append(self.group.part(name, 0, start, total))
            start += self.group.share(total)
        return found


class RowLinear(nn.Module):
    """A product with the input cut: y = sum over ranks of x_r W_r^T."""

    def __init__(self, in_features: int, out_features: int, group: TensorGroup) -> None:
        super().__init__()
        self.in_features, self.group = in_features, group
        self.weight = nn.Parameter(torch.empty(out_features, group.share(in_features)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., this rank's in] -> [..., out], alike on all ranks."""
        return _Leave.apply(F.linear(x, self.weight), self.group)

    def logical_parts(self) -> list[Part]:
        """Columns of one tensor."""
        return [self.group.part(None, 1, 0, self.in_features)]


class VocabEmbedding(nn.Module):
    """The embedding with its rows cut; the tied head too."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TensorGroup) -> None:
        super().__init__()
        self.vocab_size, self.group = vocab_size, group
        self.weight = nn.Parameter(torch.empty(group.share(vocab_size), hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> x0 [..., hidden], alike on all ranks."""
        local = ids - self.logical_parts()[0].offset
        here = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local.where(here, 0), self.weight)
        return _Leave.apply(rows * here.unsqueeze(-1), self.group)

    def logical_parts(self) -> list[Part]:
        """Rows of one tensor."""
        return [self.group.part(None, 0, 0, self.vocab_size)]


SHARDED = (ColumnLinear, RowLinear, VocabEmbedding)


def shard(model: Transformer, group: TensorGroup) -> None:
    """Replace what is cut, in place; new weights are empty (initialise or load them next)."""
    config = model.config
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.heads //= group.size
            module.kv_heads //= group.size
        for name, child in list(module.named_children()):
            replacement = _sharded(name, child, group)
            if replacement is not None:
                setattr(module, name, replacement)
    if model.embed_tokens is not None:
        embedding = VocabEmbedding(config.vocab_size, config.hidden_size, group)
        model.embed_tokens = embedding  # type: ignore[assignment]


def _sharded(name: str, child: nn.Module, group: TensorGroup) -> nn.Module | None:
    """Products that read the residual stream are cut by column, those that write to it by row."""
    if isinstance(child, FusedLinear):
        return ColumnLinear(child.in_features, child.parts, group)
    if not isinstance(child, nn.Linear):
        return None
    if name in ("o_proj", "down_proj"):
        return RowLinear(child.in_features, child.out_features, group)
    return ColumnLinear(child.in_features, {None: child.out_features}, group)


def mark_for_clipping(model: nn.Module, group: TensorGroup) -> None:
    """Tell DeepSpeed which weights are cut, and which rank counts the others in the gradient norm."""
    cut = {id(module.weight) for module in model.modules() if isinstance(module, SHARDED)}
    for parameter in model.parameters():
        if id(parameter) in cut:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        else:
            parameter.model_parallel = group.rank == 0  # type: ignore[attr-defined]


@dataclass(frozen=True)
class GroupWords(Words):
    """The words whose head rows a rank of the group holds."""

    group: TensorGroup

    @classmethod
    def of(cls, vocab_size: int, group: TensorGroup) -> "GroupWords":
        """This rank's share of the vocabulary."""
        part = group.part(None, 0, 0, vocab_size)
        return cls(part.offset, part.length, group)

    def maximum(self, x: Tensor) -> Tensor:
        """Over the group, in place."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group.handle)
        return x

    def total(self, x: Tensor) -> Tensor:
        """Over the group, in place."""
        dist.all_reduce(x, group=self.group.handle)
        return x


def enter(x: Tensor, group: TensorGroup) -> Tensor:
    """x, alike on all ranks, into a computation of which each rank does a part: gradients are summed."""
    return _Enter.apply(x, group)
