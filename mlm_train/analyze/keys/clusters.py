"""K-means over the tokens' coefficients, how well it fits, and names of clusters."""

import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm_train.analyze.keys.coefficients import CHUNK

STEPS = 100  # mini-batches that the centres see, at least
SILHOUETTE = 10_000  # tokens, at most
_CENTRAL = 5  # tokens in a cluster's name
_COMMON = 0.8  # share of a cluster's tokens that must have a feature for its name
_WORKING_MIB = 64  # of scikit-learn, for distances


class Clusters:
    """MiniBatchKMeans of rows c as they are (not normalised), fed chunk by chunk; then each row's cluster.

    labels int32 [vocabulary]; distance fp32 [vocabulary], to the own centre; within, the sum of its square.
    """

    def __init__(self, count: int, vocab_size: int, seed: int) -> None:
        self._kmeans = _kmeans(count, seed)
        self.labels = torch.zeros(vocab_size, dtype=torch.int32)
        self.distance = torch.zeros(vocab_size)
        self.within = 0.0

    def fit(self, c: Tensor) -> None:
        """Move the centres towards rows [n, keys]."""
        self._kmeans.partial_fit(c.numpy())

    def assign(self, ids: Tensor, c: Tensor) -> None:
        """Find the clusters of the tokens `ids`, whose rows are c; the centres stay."""
        labels = torch.from_numpy(self._kmeans.predict(c.numpy())).int()
        squares = (c - self.centres[labels]).square().sum(1)
        self.labels[ids], self.distance[ids] = labels, squares.sqrt()
        self.within += float(squares.sum(dtype=torch.float64))

    @property
    def centres(self) -> Tensor:
        """fp32 [clusters, keys]."""
        return torch.from_numpy(self._kmeans.cluster_centers_)

    def central(self, cluster: int, count: int | None = None) -> list[int]:
        """The tokens of a cluster, the nearest to its centre first; at most `count`."""
        members = (self.labels == cluster).nonzero().flatten()
        return members[self.distance[members].argsort(stable=True)][:count].tolist()


def _kmeans(count: int, seed: int) -> Any:
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=CHUNK)


def silhouette(rows: np.ndarray, labels: np.ndarray) -> float | None:
    """scikit-learn's mean silhouette coefficient of rows [n, keys]; None where it is not defined.

    That is with fewer than two clusters among them, or no two rows in one.
    """
    import sklearn
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(labels)) < len(labels):
        return None
    with sklearn.config_context(working_memory=_WORKING_MIB):
        return float(silhouette_score(rows, labels))


def explained(rows: np.ndarray, count: int, seed: int) -> float:
    """1 - within / total sum of squares of MiniBatchKMeans on rows [n, keys]; 0 where they are all equal."""
    total = float(rows.var(0, dtype=np.float64).sum() * len(rows))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Number of distinct clusters")
        within = float(_kmeans(count, seed).fit(rows).inertia_)
    return 1 - within / total if total > 0 else 0.0


def clustering_coefficient(rows: np.ndarray, count: int, seed: int) -> float:
    """(R - R0) / (1 - R0): what clusters explain beyond those of rows without structure.

    R = explained(rows); R0 = that of the same rows with each column shuffled on its own, which keeps every
    key's distribution and removes what keys have to do with each other. 0: none; 1: rows are equal within
    clusters.
    """
    shuffled = np.random.default_rng(seed).permuted(rows, axis=0)
    found, by_chance = explained(rows, count, seed), explained(shuffled, count, seed)
    return (found - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0


def _script(text: str) -> str | None:
    """The script of a text's letters as Unicode names them, if they have one and it is not Latin."""
    found = {unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()}
    return found.pop().capitalize() if len(found) == 1 and found != {"LATIN"} else None


_FEATURES: dict[str, Callable[[str], bool]] = {
    "leading space": lambda text: text[:1] == " " and text.strip() != "",
    "white space": str.isspace,
    "digits": lambda text: text.strip().isdigit(),
    "capitalised": lambda text: text.strip()[:1].isupper() and text.strip()[1:].islower(),
    "upper case": lambda text: len(text.strip()) > 1 and text.strip().isupper(),
    "punctuation": lambda text: (
        bool(text.strip())
        and not any(character.isalnum() or character == "\ufffd" for character in text.strip())
    ),
}


def name_of(texts: Sequence[str], central: Sequence[str]) -> str:
    """A cluster's name: what at least 80% of its tokens have in common, and its most central ones."""
    common = [name for name, has in _FEATURES.items() if sum(map(has, texts)) >= _COMMON * max(len(texts), 1)]
    scripts = Counter(filter(None, map(_script, texts)))
    common += [script for script, count in scripts.items() if count >= _COMMON * len(texts)]
    shown = " ".join(repr(text)[1:-1].replace(" ", "␣") for text in central[:_CENTRAL])
    return f"{', '.join(common)}: {shown}" if common else shown
