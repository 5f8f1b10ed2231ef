"""Training samples by a global index, the same for every layout of ranks and batches."""

from collections.abc import Sequence

import numpy as np
import torch

from mlm_train.data.prepared import TokenStream
from mlm_train.errors import UserError


class Samples:
    """Sample i of an endless sequence of epochs, each a window of sequence_length + 1 tokens.

    Window k is tokens[k*S : k*S + S + 1]: ids and next-token labels, windows one stride of S apart,
    so every token is a label once an epoch. Epoch e visits the windows in a permutation drawn from
    (seed, e) alone; seed None: in order. A data cursor is thus one number, the next sample index.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int | None) -> None:
        """Raises UserError if the split holds less than one sample."""
        if len(stream) < sequence_length + 1:
            raise UserError(
                f"{stream.bin_path} has {len(stream)} tokens, less than one sample of "
                f"sequence_length={sequence_length} (plus one); lower it or prepare more text"
            )
        self.stream = stream
        self.sequence_length = sequence_length
        self.seed = seed
        self.samples_per_epoch = (len(stream) - 1) // sequence_length
        self._epoch = -1
        self._order = np.empty(0, dtype=np.uint32)

    @property
    def tokens_per_sample(self) -> int:
        """Tokens a sample is trained on (its labels): sequence_length."""
        return self.sequence_length

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels, int64 [count, sequence_length], of samples first .. first + count - 1."""
        return self.batch_of(range(first, first + count))

    def batch_of(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels, int64 [len(indices), sequence_length]; labels[b, s] follows ids[b, s].

        Copies: they outlive the memory map and may be written to.
        """
        size = self.sequence_length
        tokens = self.stream.tokens
        ids = np.empty((len(indices), size), dtype=np.int64)
        labels = np.empty_like(ids)
        for row, start in enumerate(self._windows(indices) * size):
            ids[row] = tokens[start : start + size]
            labels[row] = tokens[start + 1 : start + size + 1]
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def windows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The same samples as int64 [len(indices), sequence_length + 1], for counting."""
        ids, labels = self.batch_of(indices)
        return np.concatenate([ids.numpy(), labels.numpy()[:, -1:]], axis=1)

    def _windows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Window numbers, int64 [len(indices)], of global sample indices."""
        epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), self.samples_per_epoch)
        if self.seed is None:
            return places
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = self._order_of(self.seed, int(epoch))[places[here]]
        return windows

    def _order_of(self, seed: int, epoch: int) -> np.ndarray:
        """The permutation of an epoch; only the last one asked for is kept."""
        if epoch != self._epoch:
            order = np.arange(self.samples_per_epoch, dtype=np.uint32)  # half the memory of int64
            np.random.default_rng([seed, epoch]).shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order
