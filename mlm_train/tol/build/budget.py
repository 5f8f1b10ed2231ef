"""How each layer is stored within a budget of bytes, and the bases of low-rank layers."""

import sys
from collections.abc import Sequence

import numpy as np
import torch

from mlm_train.errors import UserError
from mlm_train.tol.build.spectra import rank_errors_of
from mlm_train.tol.build.state import BuildPlan, BuildState
from mlm_train.tol.format.index import BASIS_ITEM
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.format.partition import ALIGNMENT
from mlm_train.tol.format.schemes import PlainDtype, Scheme
from mlm_train.tol.lowrank.knapsack import LayerOptions, Mix, best_mix
from mlm_train.tol.lowrank.spectrum import scaled_basis
from mlm_train.tol.serve.reader import BASIS_HEADER
from mlm_train.tol.storage.base import Storage
from mlm_train.utils.units import in_units


def lay_out(plan: BuildPlan, errors: Sequence[torch.Tensor] = ()) -> Layout:
    """The layout of a plan's spec; with a budget, the one of least error within it.

    errors: RankErrors.errors of each layer. Their sum over layers is minimised over the types and group sizes
    that the spec leaves open, every rank, the uncut layer and dropping it. Raises UserError for a budget that
    is too small for any layer.
    """
    spec = plan.spec
    if spec.budget is None:
        return Layout.of(spec, plan.num_layers, plan.hidden_size)
    every = range(len(spec.searched))
    # If all layers are uncut in one plain type, with no embedding, they follow each other without padding: a
    # separate search.
    grids = [_Grid(plan, every)]
    unpadded = [i for i in every if not spec.searched[i].quantised and spec.embedding is None]
    grids += [_Grid(plan, [i], unpadded=True) for i in unpadded]
    candidates = [(mix, grid) for grid in grids if (mix := grid.best(errors)) is not None]
    if not candidates:
        raise _too_small(spec.budget, plan)
    mix, grid = min(candidates, key=lambda candidate: (candidate[0].cost, candidate[0].bytes))
    picks = zip(plan.layers, (grid.options[pick] for pick in mix.picks), strict=True)
    kept = {layer: scheme for layer, scheme in picks if scheme is not None}
    return Layout(
        hidden_size=plan.hidden_size,
        layers=list(kept),
        schemes=list(kept.values()),
        embedding=spec.embedding,
    )


def warn_dropped(layers: Sequence[int], layout: Layout) -> None:
    """Warn about layers that the chosen layout drops: they read as zeros."""
    if dropped := [str(layer) for layer in layers if layer not in layout.layers]:
        what = f"layer{'s' * (len(dropped) > 1)} {', '.join(dropped)} dropped, read as 0"
        print(f"warning: {what}: no table of this size has a smaller error", file=sys.stderr)


class _Grid:
    """The searched options for storing a layer, first None (dropped), and their bytes."""

    def __init__(self, plan: BuildPlan, searched: Sequence[int], unpadded: bool = False) -> None:
        rows, hidden, schemes = plan.vocab_size, plan.hidden_size, plan.spec.searched
        columns = [hidden] if unpadded else range(hidden + 1)  # of RankErrors.errors
        self._cells = [(i, column) for i in searched for column in columns]
        self.options = [None, *(_ranked(schemes[i], column, hidden) for i, column in self._cells)]
        sizes = (
            rows * sum(option.sizes(hidden)) if option and unpadded else bytes_of(option, rows, hidden)
            for option in self.options
        )
        self.bytes = np.fromiter(sizes, np.int64)
        self.room = (plan.spec.budget or 0) - besides_layers(
            plan.spec.embedding, rows, hidden, plan.partitions
        )

    def best(self, errors: Sequence[torch.Tensor]) -> Mix | None:
        """The mix of least error that keeps a layer; None if none fits."""
        cells = tuple(np.array(self._cells).T)
        layers = []
        for layer_errors in map(torch.Tensor.numpy, errors):
            dropped = float(layer_errors.any())  # dropping a layer of zeros loses nothing
            layers.append(LayerOptions(self.bytes, np.concatenate(([dropped], layer_errors[cells]))))
        mix = best_mix(layers, self.room)
        if mix is None or any(mix.picks):
            return mix
        least = int(self.bytes[1:].argmin()) + 1  # a table of zeros must keep a layer, too
        return mix._replace(picks=(least, *mix.picks[1:])) if self.bytes[least] <= self.room else None


def _ranked(scheme: Scheme, column: int, hidden: int) -> Scheme:
    """The scheme with the rank of a column of RankErrors.errors."""
    return scheme if column == hidden else scheme.model_copy(update={"rank": column + 1})


def check_budget(plan: BuildPlan) -> None:
    """Raise a UserError for a budget that is too small for any layer, before spectra are computed."""
    if plan.spec.budget is not None and plan.spec.budget < _least(plan):
        raise _too_small(plan.spec.budget, plan)


def _least(plan: BuildPlan) -> int:
    """Bytes of the smallest table that keeps one layer."""
    rows, hidden, embedding = plan.vocab_size, plan.hidden_size, plan.spec.embedding
    specs = [
        TableSpec(schemes=[scheme], embedding=embedding)
        for uncut in plan.spec.searched
        for scheme in (uncut, _ranked(uncut, 0, hidden))
    ]
    return min(table_bytes(Layout.of(spec, 1, hidden), rows, plan.partitions) for spec in specs)


def _too_small(budget: int, plan: BuildPlan) -> UserError:
    dtype = plan.spec.dtype or "any type"
    return UserError(
        f"a budget of {in_units(budget)} is too small for any layer; give at least "
        f"{in_units(_least(plan))} for {dtype} in {plan.partitions} partitions"
    )


def headers(partitions: int) -> int:
    """Bytes of the partitions' headers: ALIGNMENT each, for any layout."""
    return partitions * ALIGNMENT


def besides_layers(embedding: PlainDtype | None, rows: int, hidden: int, partitions: int) -> int:
    """Bytes of a table that are not its layers': the partitions' headers, and the embedding."""
    stored = None if embedding is None else Scheme(dtype=embedding)
    return headers(partitions) + bytes_of(stored, rows, hidden)


def bytes_of(scheme: Scheme | None, rows: int, hidden: int) -> int:
    """Bytes that one layer adds to a table, with its basis and the basis's header; None: dropped."""
    if scheme is None:
        return 0
    basis = 0 if scheme.rank is None else BASIS_HEADER + BASIS_ITEM * hidden * scheme.rank
    return rows * scheme.bytes(hidden) + basis


def table_bytes(layout: Layout, rows: int, partitions: int) -> int:
    """Bytes of all files except the index."""
    if layout.plain:
        return headers(partitions) + rows * layout.shape.size
    layers = sum(bytes_of(scheme, rows, layout.hidden_size) for scheme in layout.schemes)
    return besides_layers(layout.embedding, rows, layout.hidden_size, partitions) + layers


def bases_of(plan: BuildPlan, layout: Layout, state: BuildState, storage: Storage) -> dict[int, torch.Tensor]:
    """The bases [rank, hidden] of low-rank layers, from their spectra."""
    schemes = dict(zip(layout.layers, layout.schemes, strict=True))
    ranks = {layer: scheme.rank for layer, scheme in schemes.items() if scheme.rank}
    return {
        layer: scaled_basis(rank_errors_of(state, storage, layer).spectrum, rank, plan.vocab_size)
        for layer, rank in ranks.items()
    }


def has_ranks(spec: TableSpec) -> bool:
    """Whether any layer may be cut, so that spectra are needed."""
    ranks = [scheme.rank for scheme in spec.schemes or ()]
    return spec.rank is not None or spec.budget is not None or any(ranks)
