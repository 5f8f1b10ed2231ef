"""Count-based baselines: the perplexity a model must beat to have learned more than word pairs.

    p_uni(w)   = (c(w) + 1) / (N + V)                                       add-one unigram
    p(w | v)   = max(c(v,w) - d, 0) / c(v)  +  d * N1+(v,.) / c(v) * p_uni(w)   d = 0.75

where c(v) counts the pairs that start with v and N1+(v,.) the distinct ids after v; an unseen v gives
p_uni(w). This is interpolated absolute discounting (Ney, Essen, Kneser 1994).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

DISCOUNT = 0.75
CHUNK_PAIRS = 1 << 22


@dataclass(frozen=True)
class BaselinePerplexities:
    """Perplexities: exp of the mean negative log-likelihood of the labels."""

    unigram: float
    bigram: float


class BigramCounts:
    """Counts of ids and of pairs of ids; windows can be added at any time."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._label_counts = np.zeros(vocab_size, dtype=np.int64)
        self._codes = np.empty(0, dtype=np.int64)  # sorted previous * vocab_size + next
        self._code_counts = np.empty(0, dtype=np.int64)

    def add(self, windows: np.ndarray) -> None:
        """Count integer windows [n, S + 1] (numpy, memory map or tensor)."""
        for previous, labels in _pairs(windows):
            self._label_counts += np.bincount(labels, minlength=self.vocab_size)
            codes, counts = np.unique(previous * self.vocab_size + labels, return_counts=True)
            self._merge(codes, counts)

    def unigram(self, labels: np.ndarray) -> np.ndarray:
        """p_uni of ids of any shape, float64."""
        return (self._label_counts[labels] + 1) / (self._label_counts.sum() + self.vocab_size)

    def bigram(self, previous: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """p(labels | previous), float64; both arguments have the same shape."""
        first = self._codes // self.vocab_size
        starts = np.bincount(first, weights=self._code_counts, minlength=self.vocab_size)[previous]
        followers = np.bincount(first, minlength=self.vocab_size)[previous]
        unigram = self.unigram(labels)
        seen = np.maximum(starts, 1)  # avoids division by zero; the result there is the unigram
        kept = np.maximum(self._count_of(previous * self.vocab_size + labels) - DISCOUNT, 0)
        return np.where(starts > 0, (kept + DISCOUNT * followers * unigram) / seen, unigram)

    def perplexities(self, windows: np.ndarray) -> BaselinePerplexities:
        """Perplexities of the labels of integer windows [n, S + 1]."""
        unigram = bigram = 0.0
        count = 0
        for previous, labels in _pairs(windows):
            unigram -= float(np.log(self.unigram(labels)).sum())
            bigram -= float(np.log(self.bigram(previous, labels)).sum())
            count += labels.size
        return BaselinePerplexities(float(np.exp(unigram / count)), float(np.exp(bigram / count)))

    def _count_of(self, codes: np.ndarray) -> np.ndarray:
        if not self._codes.size:
            return np.zeros(codes.shape, dtype=np.int64)
        indices = np.minimum(np.searchsorted(self._codes, codes), self._codes.size - 1)
        return np.where(self._codes[indices] == codes, self._code_counts[indices], 0)

    def _merge(self, codes: np.ndarray, counts: np.ndarray) -> None:
        joined = np.concatenate([self._codes, codes])
        weights = np.concatenate([self._code_counts, counts])
        order = np.argsort(joined, kind="stable")  # merges two sorted runs in linear time
        joined, weights = joined[order], weights[order]
        starts = np.flatnonzero(np.diff(joined, prepend=-1))
        self._codes, self._code_counts = joined[starts], np.add.reduceat(weights, starts)


def _pairs(windows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Previous ids and labels, flat int64, one chunk of windows at a time."""
    rows = max(1, CHUNK_PAIRS // max(windows.shape[1] - 1, 1))
    for start in range(0, windows.shape[0], rows):
        chunk = np.asarray(windows[start : start + rows], dtype=np.int64)
        yield chunk[:, :-1].ravel(), chunk[:, 1:].ravel()
