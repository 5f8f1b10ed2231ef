"""Bytes that a rank sends in a training step with owned FFN-M, by formula.

Only arithmetic on the ids that each rank asks for: parallel/ffn_m sends what is counted here. A rank's rows
to itself are left out. docs/scale.md has the formula in mathematical form.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.parallel.ffn_m.owners import Owners, rows_of, units_of

FP32 = 4


class RowBytes(NamedTuple):
    """Bytes per number of what travels: FFN-M's rows and x0, and the gradients of both."""

    rows: int
    gradients: int


class OwnedTraffic(NamedTuple):
    """Bytes that one rank sends in a step."""

    x0: int
    rows: int
    gradient_rows: int
    x0_gradients: int
    weight_gradients: int  # to a layer's other owners
    weights: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def owned_traffic(
    asked: Sequence[Tensor],
    rank: int,
    owners: Owners,
    hidden: int,
    weights: Sequence[tuple[int, int]],
    size: RowBytes,
    own_embedding: bool = True,
) -> OwnedTraffic:
    """What a rank of a stage sends. asked: distinct ids per rank, int64.

    weights: [rows, columns] of each weight of a layer's FFN-M; own_embedding: whether x0 comes from ranks
    that own its rows.
    """
    ranks, me = owners.ranks, rank
    served = wanted = 0  # rows sent out and gradient rows sent home, of all layers
    for layer in owners.layers:
        for asker, ids in enumerate(asked):
            owner = owners.rank_of(layer, units_of(ids, ranks))
            if asker == me:
                wanted += int((owner != me).sum())
            else:
                served += int((owner == me).sum())
    x0_out = x0_home = 0
    if own_embedding:
        union = torch.cat(list(asked)).unique()
        for asker, ids in enumerate(asked):
            needed = torch.cat((ids, computed_by(union, asker, owners))).unique() % ranks
            if asker == me:
                x0_home += int((needed != me).sum())
            else:
                x0_out += int((needed == me).sum())
    summed = published = 0
    for layer in owners.held(me):
        shares = owners.shares(layer)
        (mine,) = (share for share in shares if share.rank == me)
        for rows, columns in weights:
            start, stop = rows_of(mine, ranks, rows)
            summed += (rows - (stop - start)) * columns
            published += (stop - start) * columns * (len(shares) - 1)
    return OwnedTraffic(
        x0=x0_out * hidden * size.rows,
        rows=served * hidden * size.rows,
        gradient_rows=wanted * hidden * size.gradients,
        x0_gradients=x0_home * hidden * size.gradients,
        weight_gradients=summed * FP32,
        weights=published * size.rows,
    )


def computed_by(ids: Tensor, rank: int, owners: Owners) -> Tensor:
    """Those of the step's ids of which a rank computes rows of some layer."""
    return ids[owners.computes(rank, units_of(ids, owners.ranks))]
