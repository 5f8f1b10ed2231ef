"""Cross-entropy with z-loss, as sums, so that one global count of labels normalises every layout.

`loss_sums` is the plain version, from logits. `head_loss` includes the head's matmul and holds the logits of
a chunk of tokens at a time; one function serves one process and a vocabulary-parallel head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mlm_train.model.compiled import compiled
from mlm_train.model.linear import compute_dtype

IGNORED = -100
FP32 = 4
# Bytes of a chunk's logits, if they were in fp32: a GPU needs large matmuls, a CPU's cache small ones.
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 2**28, 2**31
BLOCK_BYTES = 2**23  # of the rows of a chunk whose softmax is computed at a time
# Vocabulary rows whose weight gradient is one matmul: on a CPU its bf16 result is to stay in the cache.
CPU_GRADIENT_ROWS, GPU_GRADIENT_ROWS = 2**11, 2**15
_RowFunction = Callable[..., Tensor]


class LossSums(NamedTuple):
    """Sums over the valid labels of a micro-batch; scalars."""

    cross_entropy: Tensor
    z: Tensor


def loss_sums(logits: Tensor, labels: Tensor) -> LossSums:
    """Sum of CE and of lse^2 over labels other than -100.

    logits [batch, sequence, vocabulary]; labels int64 [batch, sequence], the target at each position.
    The z-loss is PaLM's (arXiv 2204.02311): weight * lse^2 keeps the softmax normaliser near one.
    """
    valid = labels != IGNORED
    logits = logits.float()
    lse = logits.logsumexp(dim=-1)
    target = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return LossSums(((lse - target) * valid).sum(), (lse.square() * valid).sum())


def count_labels(labels: Tensor) -> int:
    """Number of valid labels; its global sum normalises the loss."""
    return int((labels != IGNORED).sum())


@dataclass(frozen=True)
class VocabRange:
    """The token ids that the rows of a head weight stand for: here the whole vocabulary.

    Row i is id `offset` + i; rows from `length` on are padding. The reductions combine values over the
    vocabulary shards; parallel/tensor/layers.py has those of a tensor-parallel group.
    """

    offset: int
    length: int

    def maximum(self, x: Tensor) -> Tensor:
        """Elementwise maximum over all shards; may overwrite x."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Elementwise sum over all shards; may overwrite x."""
        return x


def default_chunk(rows: int, device: torch.device) -> int:
    """Tokens whose logits over `rows` ids fill the device's chunk in fp32; at least one."""
    size = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(1, size // (FP32 * rows))


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float,
    z_loss: float,
    vocabulary: VocabRange,
    chunk: int | None = None,
    compiles: bool = False,
) -> tuple[Tensor, Tensor]:
    """The objective scale * (sum CE + z_loss * sum lse^2), and the sum of CE without gradient; scalars.

    hidden [..., hidden], normed; weight [rows, hidden], of `vocabulary`; labels int64 [...], -100 is ignored.
    Logits of `chunk` tokens exist at a time (default: default_chunk); all ranks must use the same chunk.

    The gradients are computed here, in the forward pass, from the logits. Hence the objective must be the
    root of the backward pass: its incoming gradient is taken to be 1; use `scale` for any factor. The
    gradients are kept until the backward pass, which may run twice (retain_graph).

    With a vocabulary-parallel head each rank gets a partial gradient of hidden; the caller sums those.

    Under autocast the matmuls and the logits are in its dtype, all else in fp32; float64 stays float64.
    `compiles`: whether the softmax is compiled.
    """
    wanted = torch.is_grad_enabled()
    return _HeadLoss.apply(
        hidden,
        weight,
        labels,
        _Settings(
            scale,
            z_loss,
            vocabulary,
            chunk or default_chunk(weight.shape[0], weight.device),
            wanted and hidden.requires_grad,
            wanted and weight.requires_grad,
            compiles,
        ),
    )


@dataclass(frozen=True)
class _Settings:
    """Arguments of head_loss other than its tensors."""

    scale: float
    z_loss: float
    vocabulary: VocabRange
    chunk: int
    hidden_gradient: bool
    weight_gradient: bool
    compiles: bool


class _HeadLoss(torch.autograd.Function):
    """Forward computes loss and gradients by chunks of tokens; backward returns the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        compute = compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            work = _ChunkedHead(hidden, weight, compute, settings)
            chunks = zip(
                hidden.reshape(-1, hidden.shape[-1]).split(settings.chunk),
                labels.reshape(-1).split(settings.chunk),
                strict=True,
            )
            for number, (chunk, targets) in enumerate(chunks):
                work.add(number * settings.chunk, chunk, targets)
        if work.hidden_gradient is not None or work.weight_gradient is not None:
            ctx.save_for_backward(*work.gradients(hidden, weight))
        cross_entropy = work.cross_entropy.to(work.exact)
        objective = (settings.scale * (work.cross_entropy + settings.z_loss * work.z)).to(work.exact)
        ctx.mark_non_differentiable(cross_entropy)
        return objective, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.saved_tensors
        return hidden, weight, None, None


class _ChunkedHead:
    """Accumulated sums and gradients, and a buffer for the logits of a chunk, reused by each."""

    def __init__(self, hidden: Tensor, weight: Tensor, compute: torch.dtype, settings: _Settings) -> None:
        self.settings, self.compute = settings, compute
        self.exact = torch.float64 if compute == torch.float64 else torch.float32
        self.weight = weight.to(compute)
        tokens, rows = min(settings.chunk, hidden.numel() // hidden.shape[-1]), weight.shape[0]
        self.logits = hidden.new_empty(tokens, rows, dtype=compute)
        self.cross_entropy = hidden.new_zeros((), dtype=torch.float64)
        self.z = hidden.new_zeros((), dtype=torch.float64)
        self.hidden_gradient = (
            torch.empty_like(hidden, memory_format=torch.contiguous_format).view(-1, hidden.shape[-1])
            if settings.hidden_gradient
            else None
        )
        self.weight_gradient = (
            torch.empty_like(weight, dtype=self.exact) if settings.weight_gradient else None
        )

    def add(self, start: int, hidden: Tensor, labels: Tensor) -> None:
        """Accumulate a chunk: hidden [tokens, hidden], labels [tokens]; `start`: its first token."""
        hidden = hidden.to(self.compute)
        vocabulary, scale, z_loss = self.settings.vocabulary, self.settings.scale, self.settings.z_loss
        logits = torch.mm(hidden, self.weight.t(), out=self.logits[: len(hidden)])
        logits[:, vocabulary.length :] = -torch.inf
        apply = _compiled_rows if self.settings.compiles else _eager_rows
        top = vocabulary.maximum(torch.cat(apply(_maximum, logits)).to(self.exact))
        rows = labels - vocabulary.offset
        in_shard = (rows >= 0) & (rows < vocabulary.length)
        index = torch.arange(len(labels), device=labels.device), rows.where(in_shard, 0)
        target = (logits[index] - top).where(in_shard, 0)
        partial = torch.stack((torch.cat(apply(_exponential_sum, logits, top)), target))
        normaliser, target = vocabulary.total(partial)
        log, valid = normaliser.log(), (labels != IGNORED).to(self.exact)
        lse = log + top
        self.cross_entropy += ((log - target) * valid).sum(dtype=torch.float64)
        self.z += (lse.square() * valid).sum(dtype=torch.float64)
        if self.hidden_gradient is None and self.weight_gradient is None:
            return
        # d/dlogit of CE + z_loss * lse^2: softmax * (1 + 2 z_loss lse), minus one at the target.
        factor = scale * valid * (1 + 2 * z_loss * lse) / normaliser
        at_target = (logits[index] - top).exp() * factor - scale * valid * in_shard
        apply(_to_gradient, logits, top, factor)
        logits[index] = at_target.to(self.compute)
        self._add_gradients(start, logits, hidden)

    def _add_gradients(self, start: int, gradient: Tensor, hidden: Tensor) -> None:
        """Accumulate from the logits' gradient [tokens, rows], in the dtype of the matmuls."""
        if self.hidden_gradient is not None:
            self.hidden_gradient[start : start + len(hidden)] = gradient @ self.weight
        if self.weight_gradient is None:
            return
        add = Tensor.copy_ if start == 0 else compiled(_add) if self.settings.compiles else _add
        rows = CPU_GRADIENT_ROWS if gradient.device.type == "cpu" else GPU_GRADIENT_ROWS
        blocks = zip(self.weight_gradient.split(rows), gradient.split(rows, dim=1), strict=True)
        for total, block in blocks:  # no bf16 matmul accumulates into fp32; in blocks its result is small
            add(total, block.t() @ hidden)

    def gradients(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden and weight, in their dtypes; None where one is not wanted."""
        of_hidden, of_weight = self.hidden_gradient, self.weight_gradient
        return (
            None if of_hidden is None else of_hidden.view(hidden.shape),
            None if of_weight is None else of_weight.to(weight.dtype),
        )


def _compiled_rows(function: _RowFunction, *columns: Tensor) -> list[Tensor]:
    """A function of a chunk's rows, compiled: one pass over the logits, without an fp32 copy."""
    return [compiled(function)(*columns)]


def _eager_rows(function: _RowFunction, logits: Tensor, *columns: Tensor) -> list[Tensor]:
    """The same in eager mode; on a CPU by blocks whose intermediate results stay in the cache."""
    rows = max(1, BLOCK_BYTES // (FP32 * logits.shape[1])) if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(rows), *(column.split(rows) for column in columns), strict=True)
    return [function(*part) for part in parts]


def _maximum(logits: Tensor) -> Tensor:
    return logits.amax(-1)


def _exponential_sum(logits: Tensor, top: Tensor) -> Tensor:
    return torch.sub(logits, top.unsqueeze(-1)).exp_().sum(-1)


def _to_gradient(logits: Tensor, top: Tensor, factor: Tensor) -> Tensor:
    return logits.copy_(torch.sub(logits, top.unsqueeze(-1)).exp_().mul_(factor.unsqueeze(-1)))


def _add(total: Tensor, part: Tensor) -> Tensor:
    return total.add_(part)
