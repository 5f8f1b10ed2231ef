"""One way to store each layer, of least cost in all within a budget of bytes: a multiple-choice knapsack.

Choices are built up layer by layer, as pairs of bytes and cost that no other pair beats in both. A Lagrangian
bound says which of them can still become better than the best choice that is known; few can, so that the
optimum is found among thousands of ways a layer (the core of Pisinger's "A minimal algorithm for the
multiple-choice knapsack problem", 1995).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_ROUGH, _FINE = 1_000, 5_000  # pairs that are kept after each layer
_ROUNDING = 1e-12  # of sums of costs in float64, relative


class Mix(NamedTuple):
    """A way for each layer: bytes and cost in all.

    gap: by how much a choice of less cost could be better, at most; 0 where it is the optimum.
    """

    picks: tuple[int, ...]
    bytes: int
    cost: float
    gap: float = 0.0


class Ways(NamedTuple):
    """Of one layer: bytes, int64 [ways]; cost, float64 [ways], infinite where a way cannot be taken."""

    bytes: np.ndarray
    costs: np.ndarray


class _Bound(NamedTuple):
    """Lagrange's: no choice within the budget costs less than `least`.

    One that costs at most c has ways whose excess, float64 [ways] of each layer, is c - least in all or less.
    """

    least: float
    excess: list[np.ndarray]


def best_mix(layers: Sequence[Ways], budget: int) -> Mix | None:
    """The mix of least cost within so many bytes, of equal ones one of fewest bytes; None where none fits.

    Exact (gap 0) unless more than 5,000 pairs would have to be kept after a layer; then its gap is stated.
    In docs/tol.md is what that comes to at the largest sizes.
    """
    fronts = [_front(one) for one in layers]
    reduced = [Ways(one.bytes[kept], one.costs[kept]) for one, kept in zip(layers, fronts, strict=True)]
    if any(not len(kept) for kept in fronts) or sum(int(one.bytes[0]) for one in reduced) > budget:
        return None
    mix, bound = _relaxed(reduced, budget)
    if mix.cost > bound.least:
        mix, _ = _search(reduced, budget, mix, bound, _ROUGH)
        mix, exact = _search(reduced, budget, mix, bound, _FINE)
        mix = mix._replace(gap=0.0 if exact else max(0.0, mix.cost - bound.least))
    picks = (int(kept[pick]) for kept, pick in zip(fronts, mix.picks, strict=True))
    return mix._replace(picks=tuple(picks))


def _front(ways: Ways) -> np.ndarray:
    """The ways that no other one beats in both bytes and cost: int64 [n], by ascending bytes."""
    order = np.lexsort((ways.costs, ways.bytes))
    costs = ways.costs[order]
    before = np.minimum.accumulate(np.concatenate(([np.inf], costs[:-1])))
    return order[costs < before]


def _relaxed(layers: Sequence[Ways], budget: int) -> tuple[Mix, _Bound]:
    """A mix within the budget, and the largest Lagrangian bound, by the secants of its dual."""

    def at(price: float) -> Mix:
        picks = tuple(int(np.argmin(one.costs + price * one.bytes)) for one in layers)
        return _mix(layers, picks)

    low = _mix(layers, tuple(len(one.costs) - 1 for one in layers))  # of least cost
    price, high = 0.0, low
    if low.bytes > budget:
        high = _mix(layers, (0,) * len(layers))  # of fewest bytes
        while True:
            price = (high.cost - low.cost) / (low.bytes - high.bytes)
            middle = at(price)
            # Where the line through both ends touches all mixes, no price bounds more.
            worth, ends = middle.cost + price * middle.bytes, low.cost + price * low.bytes
            if worth >= ends - _ROUNDING * abs(ends) or middle in (low, high):
                break
            low, high = (low, middle) if middle.bytes <= budget else (middle, high)
    worths = [one.costs + price * one.bytes for one in layers]
    least = sum(float(worth.min()) for worth in worths) - price * budget
    return high, _Bound(min(least, high.cost), [worth - worth.min() for worth in worths])


def _mix(layers: Sequence[Ways], picks: tuple[int, ...]) -> Mix:
    pairs = list(zip(layers, picks, strict=True))
    size = sum(int(one.bytes[pick]) for one, pick in pairs)
    return Mix(picks, size, float(sum(one.costs[pick] for one, pick in pairs)))


class _Pairs(NamedTuple):
    """Choices of the layers so far, by ascending bytes: [n] each."""

    bytes: np.ndarray
    costs: np.ndarray
    excess: np.ndarray
    parents: np.ndarray  # the pair before this layer
    picks: np.ndarray  # this layer's way


def _search(layers: Sequence[Ways], budget: int, known: Mix, bound: _Bound, most: int) -> tuple[Mix, bool]:
    """A mix no worse than `known`, and whether it is the best: it is if no more than `most` pairs came up."""
    gap = known.cost - bound.least + _ROUNDING * max(abs(known.cost), sum(one.costs[0] for one in layers))
    least = [int(one.bytes[0]) for one in layers]
    start = np.zeros(1)
    pairs, steps, exact = _Pairs(start.astype(np.int64), start, start, start, start), [], True
    for number, (one, excess) in enumerate(zip(layers, bound.excess, strict=True)):
        room = budget - sum(least[number + 1 :])
        pairs = _joined(_grown(pairs, one, excess, room, gap))
        if len(pairs.bytes) > most:
            pairs, exact = _thinned(pairs, most), False
        steps.append(pairs)
    if not len(pairs.bytes):
        return known, exact
    last, picks = len(pairs.bytes) - 1, []  # most bytes, least cost
    for step in reversed(steps):
        picks.append(int(step.picks[last]))
        last = int(step.parents[last])
    found = _mix(layers, tuple(reversed(picks)))
    better = (found.cost, found.bytes) < (known.cost, known.bytes)
    return found if better else known, exact


def _grown(pairs: _Pairs, layer: Ways, excess: np.ndarray, room: int, gap: float) -> Iterator[_Pairs]:
    """The pairs with each way of one more layer, but for those that cannot come to a better mix."""
    for way in np.flatnonzero(excess <= gap):
        size = pairs.bytes + layer.bytes[way]
        over = pairs.excess + excess[way]
        parents = np.flatnonzero((over <= gap) & (size <= room))
        if len(parents):
            costs = pairs.costs[parents] + layer.costs[way]
            yield _Pairs(size[parents], costs, over[parents], parents, np.full(len(parents), way))


def _joined(parts: Iterator[_Pairs]) -> _Pairs:
    """Of all of them, those that no other one beats."""
    found = list(parts)
    if not found:
        return _Pairs(*(np.zeros(0, dtype=np.int64) for _ in _Pairs._fields))
    whole = _Pairs(*(np.concatenate(columns) for columns in zip(*found, strict=True)))
    kept = _front(Ways(whole.bytes, whole.costs))
    return _Pairs(*(column[kept] for column in whole))


def _thinned(pairs: _Pairs, most: int) -> _Pairs:
    """At most so many: of those of about equal cost the one of fewest bytes, and the ends."""
    span = pairs.costs[0] - pairs.costs[-1]
    steps = np.floor((pairs.costs[0] - pairs.costs) / span * (most - 1))
    first = np.concatenate(([True], steps[1:] > steps[:-1]))
    first[-1] = True
    return _Pairs(*(column[first] for column in pairs))
