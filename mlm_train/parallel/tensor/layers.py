"""Tensor parallelism: each layer's products cut over the ranks of a group (Megatron-LM, arXiv 1909.08053).

`shard` replaces the linears, the embedding and the head of a plain Transformer; the model's own code
does not change. Dimensions that the group's size does not divide are padded with zeros at run time,
which is exact: a padded key of an FFN gives 0 and gets no gradient, padded words are masked out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.model.attention import Attention
from mlm_train.model.linear import FusedLinear
from mlm_train.model.logical import Part
from mlm_train.model.loss import VocabRange
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.tensor.collectives import TensorGroup


class ColumnLinear(nn.Module):
    """Products of one input with the output cut: y_r = x W_r^T. Fused like FusedLinear."""

    def __init__(
        self, in_features: int, parts: Mapping[str, int] | Mapping[None, int], group: TensorGroup
    ) -> None:
        super().__init__()
        self.parts, self.group = parts, group
        self.weight = nn.Parameter(torch.empty(sum(map(group.share, parts.values())), in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., positions here, in] -> [..., positions, this rank's out]."""
        return F.linear(self.group.enter(x), self.weight)

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
        """x [..., positions, this rank's in] -> [..., positions here, out]."""
        return self.group.leave(F.linear(x, self.weight))

    def logical_parts(self) -> list[Part]:
        """Columns of one tensor."""
        return [self.group.part(None, 1, 0, self.in_features)]


class VocabEmbedding(nn.Module):
    """The embedding with its rows cut; the tied head too."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TensorGroup) -> None:
        super().__init__()
        self.vocab_size, self.group = vocab_size, group
        self.weight = nn.Parameter(torch.empty(group.share(vocab_size), hidden_size))

    def _partial(self, ids: Tensor) -> Tensor:
        """The rows of the ids that are here, zeros for the others."""
        local = ids - self.logical_parts()[0].offset
        here = (local >= 0) & (local < self.weight.shape[0])
        return F.embedding(local.where(here, 0), self.weight) * here.unsqueeze(-1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, positions] -> x0 [batch, positions here, hidden]."""
        return self.group.leave(self._partial(ids))

    def rows(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> their rows [..., hidden], alike on all ranks; so must their gradient be."""
        return self.group.sum(self._partial(ids))

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
    replicated = set(map(id, _replicated(model)))
    for parameter in model.parameters():
        if id(parameter) in replicated:
            parameter.model_parallel = group.rank == 0  # type: ignore[attr-defined]
        else:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def _replicated(model: nn.Module) -> list[nn.Parameter]:
    """Weights that every rank of a tensor group holds: the norms'."""
    cut = {id(module.weight) for module in model.modules() if isinstance(module, SHARDED)}
    return [parameter for parameter in model.parameters() if id(parameter) not in cut]


def sum_replicated(model: nn.Module, group: TensorGroup) -> None:
    """Under sequence parallelism each rank saw its own positions: sum the norms' gradients, once a step."""
    parameters = _replicated(model) if group.positions > 1 else []
    if not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    summed = group.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, total in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def sum_replicated_each_pass(model: nn.Module, group: TensorGroup) -> None:
    """The same in every backward pass, for an engine that takes gradients away as they come."""
    if group.positions > 1:
        for parameter in _replicated(model):
            parameter.register_hook(group.all_reduce)


@dataclass(frozen=True)
class ParallelVocabRange(VocabRange):
    """The words whose head rows a rank of the group holds."""

    group: TensorGroup

    @classmethod
    def of(cls, vocab_size: int, group: TensorGroup) -> "ParallelVocabRange":
        """This rank's share of the vocabulary."""
        part = group.part(None, 0, 0, vocab_size)
        return cls(part.offset, part.length, group)

    def maximum(self, x: Tensor) -> Tensor:
        """Over the group."""
        return self.group.all_reduce(x, dist.ReduceOp.MAX)

    def total(self, x: Tensor) -> Tensor:
        """Over the group."""
        return self.group.all_reduce(x)
