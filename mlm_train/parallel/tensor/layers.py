"""Tensor-parallel layers: matmuls sharded over the ranks of a group (Megatron-LM, arXiv 1909.08053).

`shard` replaces the linear layers, the embedding and the head of a plain Transformer; the model's own code
does not change. Dimensions that the group's size does not divide are padded with zeros at run time, which
is exact: a padded FFN key gives 0 and gets no gradient, padded vocabulary entries are masked out.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.model.attention import Attention
from mlm_train.model.linear import FusedLinear
from mlm_train.model.logical import Part
from mlm_train.model.loss import VocabRange
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.mesh.sharded import owned_parameters, reduce_gradients
from mlm_train.parallel.tensor.collectives import TensorGroup


class ColumnLinear(nn.Module):
    """Column-parallel matmuls of one input: y_r = x W_r^T. Fused like FusedLinear."""

    def __init__(
        self, in_features: int, parts: Mapping[str, int] | Mapping[None, int], group: TensorGroup
    ) -> None:
        super().__init__()
        self.parts, self.group = parts, group
        self.weight = nn.Parameter(torch.empty(sum(map(group.shard_size, parts.values())), in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., local positions, in] -> [..., positions, local out]."""
        return F.linear(self.group.enter(x), self.weight)

    def logical_parts(self) -> list[Part]:
        """One part per fused matmul."""
        parts, start = [], 0
        for name, total in self.parts.items():
            parts.append(self.group.part(name, 0, start, total))
            start += self.group.shard_size(total)
        return parts


class RowLinear(nn.Module):
    """A row-parallel matmul: y = sum over ranks of x_r W_r^T."""

    def __init__(self, in_features: int, out_features: int, group: TensorGroup) -> None:
        super().__init__()
        self.in_features, self.group = in_features, group
        self.weight = nn.Parameter(torch.empty(out_features, group.shard_size(in_features)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., positions, local in] -> [..., local positions, out]."""
        return self.group.leave(F.linear(x, self.weight))

    def logical_parts(self) -> list[Part]:
        """This rank's columns of the weight."""
        return [self.group.part(None, 1, 0, self.in_features)]


class VocabEmbedding(nn.Module):
    """The embedding, and the tied head, sharded along the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TensorGroup) -> None:
        super().__init__()
        self.vocab_size, self.group = vocab_size, group
        self.weight = nn.Parameter(torch.empty(group.shard_size(vocab_size), hidden_size))

    def _partial(self, ids: Tensor) -> Tensor:
        """Rows of the ids in this rank's shard, zeros for the others."""
        local = ids - self.logical_parts()[0].offset
        in_shard = (local >= 0) & (local < self.weight.shape[0])
        return F.embedding(local.where(in_shard, 0), self.weight) * in_shard.unsqueeze(-1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, positions] -> x0 [batch, local positions, hidden]."""
        return self.group.leave(self._partial(ids))

    def rows(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> their rows [..., hidden]; they and their gradient are the same on all ranks."""
        return self.group.sum(self._partial(ids))

    def logical_parts(self) -> list[Part]:
        """This rank's rows of the weight."""
        return [self.group.part(None, 0, 0, self.vocab_size)]


SHARDED = (ColumnLinear, RowLinear, VocabEmbedding)


def shard(model: Transformer, group: TensorGroup, whole: Collection[nn.Module] = ()) -> None:
    """Replace the layers to shard, in place; new weights are empty (initialise or load them next).

    whole: modules that stay as they are.
    """
    config = model.config
    for module in list(model.modules()):
        if module in whole:
            continue
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
    """Matmuls that read the residual stream are column-parallel, those that write to it row-parallel."""
    if isinstance(child, FusedLinear):
        return ColumnLinear(child.in_features, child.parts, group)
    if not isinstance(child, nn.Linear):
        return None
    if name in ("o_proj", "down_proj"):
        return RowLinear(child.in_features, child.out_features, group)
    return ColumnLinear(child.in_features, {None: child.out_features}, group)


def mark_for_clipping(model: nn.Module, group: TensorGroup) -> None:
    """Mark for DeepSpeed's gradient norm the sharded weights, and the rank that counts replicated ones."""
    replicated = set(map(id, _replicated(model)))
    for parameter in model.parameters():
        if id(parameter) in replicated:
            parameter.model_parallel = group.rank == 0  # type: ignore[attr-defined]
        else:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def _replicated(model: nn.Module) -> list[nn.Parameter]:
    """Weights that every rank of a tensor group holds: the norms'."""
    sharded = {id(module.weight) for module in model.modules() if isinstance(module, SHARDED)}
    sharded |= {id(parameter) for parameter in owned_parameters(model).values()}
    return [parameter for parameter in model.parameters() if id(parameter) not in sharded]


def sum_replicated(model: nn.Module, group: TensorGroup) -> None:
    """Under sequence parallelism, all-reduce the norms' gradients of local positions, once per step."""
    if group.shards > 1:
        reduce_gradients(_replicated(model), group.all_reduce)


def sum_replicated_each_pass(model: nn.Module, group: TensorGroup) -> None:
    """The same in every backward pass, for an engine that reduces gradients in each of them."""
    if group.shards > 1:
        for parameter in _replicated(model):
            parameter.register_hook(group.all_reduce)


@dataclass(frozen=True)
class ParallelVocabRange(VocabRange):
    """The vocabulary shard of a rank: the token ids whose head rows it holds."""

    group: TensorGroup

    @classmethod
    def of(cls, vocab_size: int, group: TensorGroup) -> "ParallelVocabRange":
        """This rank's vocabulary shard."""
        part = group.part(None, 0, 0, vocab_size)
        return cls(part.offset, part.length, group)

    def maximum(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the group."""
        return self.group.all_reduce(x, "max")

    def total(self, x: Tensor) -> Tensor:
        """Elementwise sum over the group."""
        return self.group.all_reduce(x)
