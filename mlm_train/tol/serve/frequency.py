"""Which tokens a corpus has most of."""

from pathlib import Path

import numpy as np

from mlm_train.data.prepared import PreparedData

AT_ONCE = 2**26  # tokens counted at once


def counts_of(data: PreparedData) -> np.ndarray:
    """How often each id occurs in the training split, int64 [vocabulary]."""
    vocabulary = data.vocab_size
    tokens, counts = data.split("train").tokens, np.zeros(vocabulary, dtype=np.int64)
    for start in range(0, len(tokens), AT_ONCE):
        counts += np.bincount(tokens[start : start + AT_ONCE], minlength=vocabulary)
    return counts


def row_weights(counts: np.ndarray, vocab: int) -> np.ndarray:
    """One more than each token occurs, scaled to 1 on average: fp32 [vocab]. counts: of the first tokens."""
    weights = np.ones(vocab)
    weights[: len(counts)] += counts
    return (weights * (vocab / weights.sum())).astype(np.float32)


def most_frequent(data: PreparedData) -> list[int]:
    """The ids that occur in the training split, most frequent first."""
    counts = counts_of(data)
    order = np.argsort(-counts, kind="stable")
    return [int(number) for number in order[: np.count_nonzero(counts)]]


def most_frequent_in(folder: str | Path) -> list[int]:
    """As most_frequent, of a folder of `data prepare`. Raises UserError where it cannot be read."""
    return most_frequent(PreparedData.open(folder))
