"""Cross-entropy with z-loss, as sums, so that one global count of labels normalises every layout."""

from typing import NamedTuple

from torch import Tensor

IGNORED = -100


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
    """Valid labels: the global sum of these is N of the loss."""
    return int((labels != IGNORED).sum())
