"""Perplexity of a model on prepared data, with FFN-M computed or looked up."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_train.model.loss import count_labels, loss_sums
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.utils.units import perplexity


@dataclass(frozen=True)
class Perplexity:
    """Mean cross-entropy (nats per token) over `tokens` labels, and its exponential."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


@torch.inference_mode()
def measure_perplexity(
    model: Transformer,
    source: MemorySource | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    after_batch: Callable[[], object] = lambda: None,
) -> Perplexity:
    """Perplexity over batches of (ids, labels), int64 [batch, sequence]; label -100 is ignored."""
    model.eval()
    total, tokens = 0.0, 0
    for ids, labels in batches:
        total += loss_sums(model(ids, source), labels).cross_entropy.item()
        tokens += count_labels(labels)
        after_batch()
    return Perplexity(total / max(tokens, 1), tokens)
