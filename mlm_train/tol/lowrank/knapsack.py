"""Multiple-choice knapsack: one option per layer, of least total cost within a budget of bytes.

Partial mixes are built layer by layer, as Pareto-optimal pairs of bytes and cost. A Lagrangian bound prunes
those that cannot become better than the best known mix; few remain, so that the optimum is found among
thousands of options per layer (the core of Pisinger's "A minimal algorithm for the multiple-choice knapsack
problem", 1995).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_ROUGH, _FINE = 1_000, 5_000  # pairs to keep after each layer
_ROUNDING = 1e-12  # of sums of costs in float64, relative


class Mix(NamedTuple):
    """The index of an option for each layer, with the total bytes and cost.

    gap: the most by which the optimum could cost less; 0 if this is the optimum.
    """

    picks: tuple[int, ...]
    bytes: int
    cost: float
    gap: float = 0.0


class LayerOptions(NamedTuple):
    """The options of one layer: bytes, int64 [options]; costs, float64 [options], infinite if impossible."""

    bytes: np.ndarray
    costs: np.ndarray


class _Bound(NamedTuple):
    """A Lagrangian bound: no mix within the budget costs less than `least`.

    excess: float64 [options] of each layer. The excess of a mix that costs c sums to at most c - least.
    """

    least: float
    excess: list[np.ndarray]


def best_mix(layers: Sequence[LayerOptions], budget: int) -> Mix | None:
    """The mix of least cost within `budget` bytes, then of fewest bytes; None if none fits.

    Exact (gap 0) unless more than 5,000 pairs would have to be kept after a layer; then `gap` bounds the
    error (docs/tol.md has figures for the largest sizes).
    """
    fronts = [_front(options) for options in layers]
    reduced = [
        LayerOptions(options.bytes[front], options.costs[front])
        for options, front in zip(layers, fronts, strict=True)
    ]
    if any(not len(front) for front in fronts) or sum(int(options.bytes[0]) for options in reduced) > budget:
        return None
    mix, bound = _relaxed(reduced, budget)
    if mix.cost > bound.least:
        mix, _ = _search(reduced, budget, mix, bound, _ROUGH)
        mix, exact = _search(reduced, budget, mix, bound, _FINE)
        mix = mix._replace(gap=0.0 if exact else max(0.0, mix.cost - bound.least))
    picks = (int(front[pick]) for front, pick in zip(fronts, mix.picks, strict=True))
    return mix._replace(picks=tuple(picks))


def _front(options: LayerOptions) -> np.ndarray:
    """Indices of the Pareto-optimal options: int64 [n], by ascending bytes."""
    order = np.lexsort((options.costs, options.bytes))
    costs = options.costs[order]
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], costs[:-1])))
    return order[costs < best_before]


def _relaxed(layers: Sequence[LayerOptions], budget: int) -> tuple[Mix, _Bound]:
    """A mix within the budget, and the largest Lagrangian bound, by the secant method on its dual."""

    def cheapest(price: float) -> Mix:
        return _mix(layers, tuple(int(np.argmin(layer.costs + price * layer.bytes)) for layer in layers))

    low = _mix(layers, tuple(len(layer.costs) - 1 for layer in layers))  # of least cost
    price, high = 0.0, low
    if low.bytes > budget:
        high = _mix(layers, (0,) * len(layers))  # of fewest bytes
        while True:
            price = (high.cost - low.cost) / (low.bytes - high.bytes)
            middle = cheapest(price)
            # If no mix lies below the line through both ends, no price gives a larger bound.
            value, end_value = middle.cost + price * middle.bytes, low.cost + price * low.bytes
            if value >= end_value - _ROUNDING * abs(end_value) or middle in (low, high):
                break
            low, high = (low, middle) if middle.bytes <= budget else (middle, high)
    values = [layer.costs + price * layer.bytes for layer in layers]
    least = sum(float(value.min()) for value in values) - price * budget
    return high, _Bound(min(least, high.cost), [value - value.min() for value in values])


def _mix(layers: Sequence[LayerOptions], picks: tuple[int, ...]) -> Mix:
    pairs = list(zip(layers, picks, strict=True))
    size = sum(int(layer.bytes[pick]) for layer, pick in pairs)
    return Mix(picks, size, float(sum(layer.costs[pick] for layer, pick in pairs)))


class _Pairs(NamedTuple):
    """Partial mixes of the layers so far, by ascending bytes: [n] each."""

    bytes: np.ndarray
    costs: np.ndarray
    excess: np.ndarray
    parents: np.ndarray  # index of the pair before this layer
    picks: np.ndarray  # this layer's option


def _search(
    layers: Sequence[LayerOptions], budget: int, known: Mix, bound: _Bound, most: int
) -> tuple[Mix, bool]:
    """A mix no worse than `known`, and whether it is optimal: it is unless more than `most` pairs came up."""
    gap = known.cost - bound.least + _ROUNDING * max(abs(known.cost), sum(layer.costs[0] for layer in layers))
    least_bytes = [int(layer.bytes[0]) for layer in layers]
    start = np.zeros(1)
    pairs, steps, exact = _Pairs(start.astype(np.int64), start, start, start, start), [], True
    for number, (layer, excess) in enumerate(zip(layers, bound.excess, strict=True)):
        room = budget - sum(least_bytes[number + 1 :])
        pairs = _merged(_extended(pairs, layer, excess, room, gap))
        if len(pairs.bytes) > most:
            pairs, exact = _thinned(pairs, most), False
        steps.append(pairs)
    if not len(pairs.bytes):
        return known, exact
    last, picks = len(pairs.bytes) - 1, []  # most bytes, least cost
    for step in reversed(steps):
        picks.append(int(step.picks[last]))
        last = int(step.parents[last])
    mix = _mix(layers, tuple(reversed(picks)))
    better = (mix.cost, mix.bytes) < (known.cost, known.bytes)
    return mix if better else known, exact


def _extended(
    pairs: _Pairs, layer: LayerOptions, excess: np.ndarray, room: int, gap: float
) -> Iterator[_Pairs]:
    """The pairs extended by each option of one more layer, without those that the bound rules out."""
    for option in np.flatnonzero(excess <= gap):
        size = pairs.bytes + layer.bytes[option]
        total_excess = pairs.excess + excess[option]
        parents = np.flatnonzero((total_excess <= gap) & (size <= room))
        if len(parents):
            costs = pairs.costs[parents] + layer.costs[option]
            picks = np.full(len(parents), option)
            yield _Pairs(size[parents], costs, total_excess[parents], parents, picks)


def _merged(parts: Iterator[_Pairs]) -> _Pairs:
    """The Pareto-optimal pairs of all parts."""
    given = list(parts)
    if not given:
        return _Pairs(*(np.zeros(0, dtype=np.int64) for _ in _Pairs._fields))
    merged = _Pairs(*(np.concatenate(columns) for columns in zip(*given, strict=True)))
    front = _front(LayerOptions(merged.bytes, merged.costs))
    return _Pairs(*(column[front] for column in merged))


def _thinned(pairs: _Pairs, most: int) -> _Pairs:
    """At most `most` pairs: of those of about equal cost the one of fewest bytes, and both ends."""
    span = pairs.costs[0] - pairs.costs[-1]
    steps = np.floor((pairs.costs[0] - pairs.costs) / span * (most - 1))
    first = np.concatenate(([True], steps[1:] > steps[:-1]))
    first[-1] = True
    return _Pairs(*(column[first] for column in pairs))
