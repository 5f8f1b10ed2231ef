"""Ranks of a ToL's layers under one budget of bytes, and from where on a cut saves nothing."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from heapq import merge

from mlm_train.tol.spectrum import Spectrum


def choose_ranks(
    spectra: Sequence[Spectrum],
    budget: float,
    bytes_per_rank: float | Sequence[float],
    weights: Sequence[float] | None = None,
    step: int = 1,
) -> list[int]:
    """The rank of each layer that makes Σ_l w_l · error_l(rank_l)² least within `budget` bytes.

    `bytes_per_rank`: cost of one more rank, in every layer or for each one: V · bytes of a number of U, its
    share of scales included, + h · bytes of a number of the basis. `weights` (default 1): measured
    sensitivities, or the layers' energies for absolute errors. A rank is 0 (a dropped layer), a multiple of
    `step`, or h; the groups of a quantised U are such a step. Optimal where `step` ranks cost the same in
    every layer and divide h; else short of the optimum by less than the gain of `step` ranks of one layer.
    """
    costs = _per_layer(bytes_per_rank, len(spectra))
    scales = _per_layer(1.0 if weights is None else weights, len(spectra))
    if step < 1 or min(costs, default=1) <= 0 or min(scales, default=0) < 0:
        raise ValueError(f"step {step} and costs {costs} must be positive, weights {scales} not negative")
    # Singular values descend, so each layer's blocks gain less and less a byte: taking the block of most gain
    # a byte over all layers respects every layer's order, and of blocks that cost the same no other choice
    # of as many gains more. Of others, those taken until one does not fit gain, with the fraction of that
    # one that would fit, no less than any choice within the budget.
    ranks = [0] * len(spectra)
    layers = enumerate(zip(spectra, scales, costs, strict=True))
    for _, start, layer, stop in merge(*(_blocks(layer, *of_layer, step) for layer, of_layer in layers)):
        price = costs[layer] * (stop - start)
        if start == ranks[layer] and price <= budget:  # where the layer's blocks before it were taken
            ranks[layer] = stop
            budget -= price
    return ranks


def _blocks(
    layer: int, spectrum: Spectrum, weight: float, cost: float, step: int
) -> Iterator[tuple[float, int, int, int]]:
    """(-gain a byte, rank before, layer, rank after) of a layer's blocks, as far as they gain anything.

    Sorted as tuples, blocks of equal gain go to the layer of least rank.
    """
    energy = spectrum.energy
    for number, energies in enumerate(spectrum.values.square().split(step)):
        gain = weight * float(energies.mean())
        if not gain:
            return
        start = number * step
        yield -gain / (energy * cost), start, layer, start + len(energies)


def uniform_rank(
    layers: int, budget: float, bytes_per_rank: float | Sequence[float], step: int = 1, *, hidden: int
) -> int:
    """The largest rank that all layers can have within `budget` bytes: a multiple of `step`, or `hidden`."""
    rank = int(budget // sum(_per_layer(bytes_per_rank, layers)))
    return hidden if rank >= hidden else max(0, rank - rank % step)


def _per_layer(value: float | Sequence[float], layers: int) -> list[float]:
    """One number for every layer, or one for each; ValueError for another count."""
    values = list(value) if isinstance(value, Sequence) else [value] * layers
    if len(values) != layers:
        raise ValueError(f"{len(values)} values for {layers} layers")
    return values


def break_even_rank(
    rows: int, hidden: int, table_bytes: float = 1, u_bytes: float = 1, basis_bytes: float = 1
) -> int:
    """The smallest rank at which a cut saves nothing against `hidden` plain numbers a row.

    Bytes of one number, scales included, of the plain table, of U and of the basis; equal ones give the
    paper's V·h / (V + h), rounded up. More than `hidden` where every cut saves, as into a smaller type.
    A layer whose chosen rank reaches it is better stored plain: no larger, and without an error.
    """
    plain = rows * hidden * Fraction(table_bytes)
    return math.ceil(plain / (rows * Fraction(u_bytes) + hidden * Fraction(basis_bytes)))
