"""Training samples by a global index, the same for every parallel layout and batch size."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mlm_train.data.order import Interleaving, shuffled
from mlm_train.data.token_stream import TokenStream
from mlm_train.errors import UserError

BLOCK = 4096  # samples located at once


class Consumed(NamedTuple):
    """What training has consumed from one source. tokens: positions trained on."""

    samples: int
    tokens: int
    epochs: float


class SampleSource:
    """The samples of one stream: an endless sequence of epochs over its windows.

    Window k is tokens[k*S : k*S + S + 1], ids and next-token labels, with sequence length and stride S,
    so every token is a label once per epoch. Epoch e visits the windows in a permutation that follows from
    (seed, e) alone; seed None: in order.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int | None) -> None:
        """Raises UserError where the split holds less than one sample."""
        if len(stream) < sequence_length + 1:
            raise UserError(
                f"{stream.bin_path} has {len(stream)} tokens, fewer than one sample of "
                f"sequence_length={sequence_length} (plus one); lower it or prepare more text"
            )
        self.stream, self.seed = stream, seed
        self.samples_per_epoch = (len(stream) - 1) // sequence_length

    def windows(self, numbers: np.ndarray) -> np.ndarray:
        """Window numbers of this source's samples `numbers`, both int64 [n]."""
        epochs, positions = np.divmod(numbers, self.samples_per_epoch)
        if self.seed is None:
            return positions
        return shuffled(positions, self.samples_per_epoch, self.seed, epochs)


class Samples:
    """The samples of a run, from one source or from several, each within one sample of its share.

    The source and the window of sample i follow from i, the seed and the shares alone, so the data cursor
    of a checkpoint is one number, the next sample index.
    """

    def __init__(
        self,
        streams: TokenStream | Sequence[TokenStream],
        sequence_length: int,
        seed: int | None,
        shares: Sequence[int] = (1,),
    ) -> None:
        """`shares`: whole numbers, one per stream. Raises UserError for a stream shorter than one sample."""
        streams = [streams] if isinstance(streams, TokenStream) else streams
        self.sources = [SampleSource(stream, sequence_length, seed) for stream in streams]
        self.sequence_length = sequence_length
        self.interleaving = Interleaving(shares)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Number of windows of all sources."""
        return sum(source.samples_per_epoch for source in self.sources)

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels, int64 [count, sequence_length], of samples first .. first + count - 1."""
        return self.batch_of(range(first, first + count))

    def batch_of(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels, int64 [len(indices), sequence_length]; labels[b, s] follows ids[b, s].

        Copies: they outlive the memory map and may be written to.
        """
        return self._read(*self.locate(indices))

    def spread(self, chosen: Sequence[int] | np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and labels of samples `chosen` out of `count` that are spread evenly over each source.

        Each source has its share of the `count` samples.
        """
        sources, numbers = self.interleaving.at(np.asarray(chosen, dtype=np.int64))
        sizes = np.array([source.samples_per_epoch for source in self.sources])
        counts = np.array(self.interleaving.counts(count))
        return self._read(sources, numbers * sizes[sources] // counts[sources])

    def sources_of(self, count: int) -> np.ndarray:
        """The source of each of the first `count` samples, int64 [count]; also of those of `spread`."""
        return self.interleaving.at(np.arange(count))[0]

    def windows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Samples as windows, int64 [len(indices), sequence_length + 1]."""
        ids, labels = self.batch_of(indices)
        return np.concatenate([ids.numpy(), labels.numpy()[:, -1:]], axis=1)

    def consumed(self, samples: int) -> list[Consumed]:
        """What the first `samples` samples consume from each source."""
        return [
            Consumed(count, count * self.sequence_length, count / source.samples_per_epoch)
            for count, source in zip(self.interleaving.counts(samples), self.sources, strict=True)
        ]

    def locate(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources and window numbers, int64 [len(indices)], of global sample indices."""
        blocks, offsets = np.divmod(np.asarray(indices, dtype=np.int64), BLOCK)
        sources, windows = np.empty_like(offsets), np.empty_like(offsets)
        for block in np.unique(blocks):
            here = blocks == block
            block_sources, block_windows = self._block(int(block))
            sources[here], windows[here] = block_sources[offsets[here]], block_windows[offsets[here]]
        return sources, windows

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and windows, int64 [BLOCK], of consecutive samples; the last two blocks are cached."""
        if block not in self._blocks:
            sources, windows = self.interleaving.at(np.arange(block * BLOCK, (block + 1) * BLOCK))
            for number, source in enumerate(self.sources):
                mine = sources == number
                windows[mine] = source.windows(windows[mine])
            self._blocks = dict([*self._blocks.items()][-1:]) | {block: (sources, windows)}
        return self._blocks[block]

    def _read(self, sources: np.ndarray, windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.sequence_length
        ids = np.empty((len(windows), size), dtype=np.int64)
        labels = np.empty_like(ids)
        starts = (windows * size).tolist()
        for row, (source, start) in enumerate(zip(sources.tolist(), starts, strict=True)):
            window = self.sources[source].stream.tokens[start : start + size + 1]
            ids[row], labels[row] = window[:-1], window[1:]
        return torch.from_numpy(ids), torch.from_numpy(labels)
