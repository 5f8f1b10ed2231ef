"""Layers cut to low rank: their spectra, how each is stored within a budget, and the bases."""

import sys
from collections.abc import Sequence

import numpy as np
import torch

from mlm_train.errors import UserError
from mlm_train.tol.build.spectra import study_of
from mlm_train.tol.build.state import BuildPlan, BuildState
from mlm_train.tol.format.index import BASIS_ITEM
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.format.partition import ALIGNMENT
from mlm_train.tol.format.schemes import Scheme
from mlm_train.tol.lowrank.knapsack import Mix, Ways, best_mix
from mlm_train.tol.lowrank.spectrum import scaled_basis
from mlm_train.tol.serve.reader import BASIS_HEADER
from mlm_train.tol.storage.base import Storage
from mlm_train.utils.units import in_units


def lay_out(plan: BuildPlan, errors: Sequence[torch.Tensor] = ()) -> Layout:
    """The schemes of the storage that was asked for; where it has a budget, one of its own for each layer.

    errors: of each layer, as Study predicts them. Their sum over layers is made least within the budget, over
    the types and group sizes that the storage leaves open, every rank, the whole layer and a dropped one.
    Raises UserError for a budget that holds nothing.
    """
    spec = plan.spec
    if spec.budget is None:
        return Layout.of(spec, plan.num_layers, plan.hidden_size)
    every = range(len(spec.searched))
    # Layers that all are whole in one plain type follow each other without padding: a table of its own kind.
    grids = [_Grid(plan, every)]
    grids += [_Grid(plan, [one], unpadded=True) for one in every if not spec.searched[one].quantised]
    found = [(mix, grid) for grid in grids if (mix := grid.best(errors)) is not None]
    if not found:
        raise _too_small(spec.budget, plan)
    mix, grid = min(found, key=lambda one: (one[0].cost, one[0].bytes))
    picks = zip(plan.layers, (grid.ways[pick] for pick in mix.picks), strict=True)
    kept = {layer: scheme for layer, scheme in picks if scheme is not None}
    return Layout(hidden_size=plan.hidden_size, layers=list(kept), schemes=list(kept.values()))


def say_dropped(layers: Sequence[int], layout: Layout) -> None:
    """Warn of layers that a choice left out: they read as zeros."""
    if dropped := [str(layer) for layer in layers if layer not in layout.layers]:
        what = f"layer{'s' * (len(dropped) > 1)} {', '.join(dropped)} dropped, read as 0"
        print(f"warning: {what}: no table of as many bytes has a smaller error", file=sys.stderr)


class _Grid:
    """The ways to store a layer that are searched, None for a dropped one first, and their bytes."""

    def __init__(self, plan: BuildPlan, searched: Sequence[int], unpadded: bool = False) -> None:
        rows, hidden, schemes = plan.vocab_size, plan.hidden_size, plan.spec.searched
        columns = [hidden] if unpadded else range(hidden + 1)  # of Study.errors: rank column + 1, or whole
        self._cells = [(one, column) for one in searched for column in columns]
        self.ways = [None, *(_ranked(schemes[one], column, hidden) for one, column in self._cells)]
        sizes = (
            rows * sum(way.sizes(hidden)) if way and unpadded else bytes_of(way, rows, hidden)
            for way in self.ways
        )
        self.bytes = np.fromiter(sizes, np.int64)
        self.room = (plan.spec.budget or 0) - headers(plan.partitions)

    def best(self, errors: Sequence[torch.Tensor]) -> Mix | None:
        """Of least error that keeps a layer; None where none fits."""
        where = tuple(np.array(self._cells).T)
        layers = []
        for one in map(torch.Tensor.numpy, errors):
            dropped = float(one.any())  # what is lost of zeros is nothing
            layers.append(Ways(self.bytes, np.concatenate(([dropped], one[where]))))
        mix = best_mix(layers, self.room)
        if mix is None or any(mix.picks):
            return mix
        least = int(self.bytes[1:].argmin()) + 1  # of a table of zeros something is kept, too
        return mix._replace(picks=(least, *mix.picks[1:])) if self.bytes[least] <= self.room else None


def _ranked(scheme: Scheme, column: int, hidden: int) -> Scheme:
    return scheme if column == hidden else scheme.model_copy(update={"rank": column + 1})


def check_budget(plan: BuildPlan) -> None:
    """UserError for a budget of which it is known before any spectrum that it holds nothing."""
    if plan.spec.budget is not None and plan.spec.budget < _least(plan):
        raise _too_small(plan.spec.budget, plan)


def _least(plan: BuildPlan) -> int:
    """Bytes of a table of one layer, stored in the smallest way."""
    rows, hidden = plan.vocab_size, plan.hidden_size
    cut = [bytes_of(_ranked(one, 0, hidden), rows, hidden) for one in plan.spec.searched]
    whole = [rows * Layout.of(TableSpec(schemes=[one]), 1, hidden).shape.size for one in plan.spec.searched]
    return headers(plan.partitions) + min(cut + whole)


def _too_small(budget: int, plan: BuildPlan) -> UserError:
    dtype = plan.spec.dtype or "any type"
    return UserError(
        f"a budget of {in_units(budget)} holds no layer: {in_units(_least(plan))} is the least in "
        f"{dtype} and {plan.partitions} partitions; give more"
    )


def headers(partitions: int) -> int:
    """Bytes of the partitions' headers: each takes one unit of their alignment, whatever the layout."""
    return partitions * ALIGNMENT


def bytes_of(way: Scheme | None, rows: int, hidden: int) -> int:
    """Of one layer in the whole table, its basis and that one's part of a header included; None: dropped."""
    if way is None:
        return 0
    basis = 0 if way.rank is None else BASIS_HEADER + BASIS_ITEM * hidden * way.rank
    return rows * way.bytes(hidden) + basis


def table_bytes(layout: Layout, rows: int, partitions: int) -> int:
    """Of all files but the index."""
    if layout.plain:
        return headers(partitions) + rows * layout.shape.size
    return headers(partitions) + sum(bytes_of(scheme, rows, layout.hidden_size) for scheme in layout.schemes)


def bases_of(plan: BuildPlan, layout: Layout, state: BuildState, storage: Storage) -> dict[int, torch.Tensor]:
    """The bases of the layers that have a rank."""
    ranks = {layer: one.rank for layer, one in zip(layout.layers, layout.schemes, strict=True) if one.rank}
    return {
        layer: scaled_basis(study_of(state, storage, layer).spectrum, rank, plan.vocab_size)
        for layer, rank in ranks.items()
    }


def has_ranks(spec: TableSpec) -> bool:
    """Whether some layer is cut, so that spectra are needed."""
    ranks = [scheme.rank for scheme in spec.schemes or ()]
    return spec.rank is not None or spec.budget is not None or any(ranks)
