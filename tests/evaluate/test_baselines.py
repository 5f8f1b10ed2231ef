import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from mlm_train.evaluate import baselines
from mlm_train.evaluate.baselines import BaselinePerplexities, BigramCounts

VOCAB = 23


def baseline_perplexities(
    train_windows: np.ndarray, evaluation_windows: np.ndarray, vocab_size: int
) -> BaselinePerplexities:
    """Count the first windows and score the second."""
    counts = BigramCounts(vocab_size)
    counts.add(train_windows)
    return counts.perplexities(evaluation_windows)


def slow(train, evaluation, vocab):
    """The formulas written out with dictionaries."""
    pairs, starts, labels = Counter(), Counter(), Counter()
    for window in train.tolist():
        for v, w in itertools.pairwise(window):
            pairs[v, w] += 1
            starts[v] += 1
            labels[w] += 1
    followers = Counter(v for v, _ in pairs)
    total = sum(labels.values())

    def unigram(w):
        return (labels[w] + 1) / (total + vocab)

    def bigram(v, w):
        if not starts[v]:
            return unigram(w)
        kept = max(pairs[v, w] - 0.75, 0) / starts[v]
        return kept + 0.75 * followers[v] / starts[v] * unigram(w)

    steps = [(v, w) for window in evaluation.tolist() for v, w in itertools.pairwise(window)]
    mean = [sum(math.log(p(v, w)) for v, w in steps) / len(steps) for p in (lambda v, w: unigram(w), bigram)]
    return math.exp(-mean[0]), math.exp(-mean[1])


@pytest.fixture
def windows():
    rng = np.random.default_rng(3)
    train = np.minimum(rng.geometric(0.2, (40, 17)), VOCAB - 4)  # some ids never seen
    evaluation = rng.integers(0, VOCAB, (11, 17))
    return train, evaluation


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
def test_equals_the_slow_way(windows, chunk, monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK_PAIRS", chunk)
    found = baseline_perplexities(*windows, VOCAB)
    assert (found.unigram, found.bigram) == pytest.approx(slow(*windows, VOCAB), rel=1e-12)


def test_probabilities_sum_to_one(windows):
    counts = BigramCounts(VOCAB)
    counts.add(windows[0])
    every = np.arange(VOCAB)
    assert counts.unigram(every).sum() == pytest.approx(1.0)
    for v in every:  # seen and unseen ones
        assert counts.bigram(np.full(VOCAB, v), every).sum() == pytest.approx(1.0)


def test_tensors_and_parts_count_the_same(windows):
    train, evaluation = windows
    counts = BigramCounts(VOCAB)
    counts.add(torch.from_numpy(train[:10]))
    counts.add(train[10:].astype(np.uint16))
    assert counts.perplexities(torch.from_numpy(evaluation)) == baseline_perplexities(*windows, VOCAB)


def test_nothing_counted_is_uniform(windows):
    found = baseline_perplexities(np.empty((0, 17), dtype=np.int64), windows[1], VOCAB)
    assert (found.unigram, found.bigram) == pytest.approx((VOCAB, VOCAB))
