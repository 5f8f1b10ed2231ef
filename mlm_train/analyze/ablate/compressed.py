"""FFN-M as compressed tables would return it, from a table in a plain type."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from mlm_train.tol.allocate.mixes import size_of
from mlm_train.tol.allocate.sensitivity import Choice, Trial, spectra_of
from mlm_train.tol.format.schemes import GROUP, LEVELS, Dtype, Scheme
from mlm_train.tol.lowrank.knapsack import LayerOptions, best_mix
from mlm_train.tol.serve.frequency import row_weights
from mlm_train.tol.serve.reader import TableReader

# The same rank in all layers, of all rows alike; of rows by how often their token occurs; a rank per layer.
Variant = Literal["uniform", "weighted", "per layer"]


class Compressed:
    """A table, and what is left of it when it is compressed.

    counts: int64 [vocabulary], how often each token occurs.
    """

    def __init__(self, table: TableReader, counts: np.ndarray) -> None:
        self.table, self.index = table, table.index
        self.spectra = spectra_of(table)
        self._plain = Trial(table, self.spectra)
        weights = torch.from_numpy(row_weights(counts, self.index.vocab_size))
        self._weighted = Trial(table, spectra_of(table, weights))

    def in_type(self, dtype: Dtype) -> tuple[Trial, int]:
        """A source of the values rounded to a type, with its bytes."""
        scheme = Scheme(dtype=dtype, group_size=GROUP if dtype in LEVELS else None)
        return self._measured(self._plain, dict.fromkeys(self.index.layers, scheme))

    def cut(self, share: float, variant: Variant) -> tuple[Trial, int]:
        """A source of the values without this share of the directions, in bfloat16, with its bytes."""
        hidden = self.index.hidden_size
        rank = max(1, round(hidden * (1 - share)))
        uniform: dict[int, Choice] = dict.fromkeys(self.index.layers, _ranked(rank, hidden))
        if variant == "per layer":
            return self._measured(self._plain, self._per_layer(rank * len(uniform)))
        return self._measured(self._weighted if variant == "weighted" else self._plain, uniform)

    def _per_layer(self, ranks: int) -> Mapping[int, Choice]:
        """Ranks of the layers with this sum whose squared relative errors have the least sum."""
        hidden = self.index.hidden_size
        options = []
        for spectrum in self.spectra.values():
            errors = [spectrum.error(rank) ** 2 for rank in range(1, hidden + 1)]
            options.append(LayerOptions(np.arange(1, hidden + 1), np.array(errors)))
        mix = best_mix(options, ranks)
        assert mix is not None  # a rank of 1 in each layer fits
        picks = zip(self.index.layers, mix.picks, strict=True)
        return {layer: _ranked(pick + 1, hidden) for layer, pick in picks}

    def _measured(self, trial: Trial, chosen: Mapping[int, Choice]) -> tuple[Trial, int]:
        trial.chosen = dict(chosen)
        return trial, size_of(self.index, chosen)


def _ranked(rank: int, hidden: int) -> Scheme:
    return Scheme(dtype="bfloat16", rank=None if rank == hidden else rank)
