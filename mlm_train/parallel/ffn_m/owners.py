"""Which ranks of a stage own the FFN-M of which layers; arithmetic only.

Whole layers are dealt to the ranks in turn. The layers left over, fewer than ranks, are laid end to end and
cut into equal parts, one per rank: a part is a range of units of one or two layers, of as many units per
layer as there are ranks. The owners of a divided layer split its rows by a hash of the id, and its weights'
optimizer state by rows, both in proportion to their units, so that every rank has the same work and state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PRIME = 2654435761  # Knuth's multiplicative hash: ids of similar frequency go to different ranks


class Share(NamedTuple):
    """Units [start, stop) of a layer that one rank owns."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Owners:
    """The owners of `layers`, of a stage's `ranks`."""

    layers: Sequence[int]
    ranks: int

    @property
    def whole(self) -> int:
        """How many layers, the first ones, have one owner each."""
        return len(self.layers) // self.ranks * self.ranks

    @property
    def divided(self) -> int:
        """How many layers have several owners."""
        return len(self.layers) - self.whole

    def shares(self, layer: int) -> list[Share]:
        """A layer's owners with their units."""
        at, ranks, divided = self.layers.index(layer), self.ranks, self.divided
        if at < self.whole:
            return [Share(at % ranks, 0, ranks)]
        start = (at - self.whole) * ranks  # the layer's first unit among those of all divided layers
        owners = range(start // divided, (start + ranks - 1) // divided + 1)
        return [
            Share(rank, max(rank * divided - start, 0), min((rank + 1) * divided - start, ranks))
            for rank in owners
        ]

    def held(self, rank: int) -> list[int]:
        """The layers of which a rank owns something."""
        held = list(self.layers[rank : self.whole : self.ranks])
        if self.divided:
            first, last = rank * self.divided, (rank + 1) * self.divided - 1  # its units
            held += self.layers[self.whole + first // self.ranks : self.whole + last // self.ranks + 1]
        return held

    def rank_of(self, layer: int, units: Tensor) -> Tensor:
        """The rank that computes the rows of ids with these units (see units_of)."""
        at = self.layers.index(layer)
        if at < self.whole:
            return units.new_full(units.shape, at % self.ranks)
        return ((at - self.whole) * self.ranks + units) // self.divided

    def computes(self, rank: int, units: Tensor) -> Tensor:
        """Which ids, by their units, a rank computes rows of, in some layer: bool [ids]."""
        found = torch.zeros(units.shape, dtype=torch.bool)
        for layer in self.held(rank):
            found |= self.rank_of(layer, units) == rank
        return found

    def rounds(self) -> list[list[int]]:
        """The layers in the order of their exchange: in each round every rank has an equal part."""
        rounds = [list(self.layers[at : at + self.ranks]) for at in range(0, self.whole, self.ranks)]
        return rounds + ([list(self.layers[self.whole :])] if self.divided else [])


def units_of(ids: Tensor, ranks: int) -> Tensor:
    """Each id's unit in [0, ranks), by hash."""
    return (ids * PRIME % 2**32) * ranks >> 32


def rows_of(share: Share, units: int, rows: int) -> tuple[int, int]:
    """[start, stop) of a parameter's rows for a share of `units` units."""
    return share.start * rows // units, share.stop * rows // units
