"""Which layer gets which bytes: the ways to store one, and the best mixes.

Sums of sensitivities over layers predict what a mix costs; the mixes of least sum for every number of bytes
are found by dynamic programming.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlm_train.tol.build import partitions_of
from mlm_train.tol.codec import GROUP, Scheme
from mlm_train.tol.format import BASIS_ITEM, TolIndex
from mlm_train.tol.lowrank import table_bytes
from mlm_train.tol.sensitivities import Choice
from mlm_train.tol.state import Layout, Storage

_RANKS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
_STEPS = 8192  # of the dynamic programming's bytes


def choices(hidden: int) -> list[Choice]:
    """The ways to store a layer that are tried: dropped, fewer bits, low rank, and low rank in fewer bits."""
    found: list[Choice] = [None, Scheme(dtype="bfloat16")]
    for size in (16, 24, 32, 48, 64, 96, 128):  # smaller ones may be free: layers are padded to 16 bytes
        found.append(Scheme(dtype="int4", group_size=size))
        found.append(Scheme(dtype="int4", group_size=size, symmetric=False))
    found.append(Scheme(dtype="int8", group_size=GROUP))
    # Ranks that fill their groups; smaller groups where a layer has few.
    group = min(GROUP, max(8, hidden // 16))
    ranks = sorted({max(group, round(hidden * part / group) * group) for part in _RANKS})
    for rank in ranks:
        if rank < hidden:
            found += [Scheme(dtype=dtype, rank=rank, group_size=group) for dtype in ("int4", "int8")]
    return found


def bytes_of(choice: Choice, rows: int, hidden: int) -> int:
    """Of one layer in the whole table, its basis included; headers apart."""
    if choice is None:
        return 0
    return rows * choice.bytes(hidden) + BASIS_ITEM * hidden * (choice.rank or 0)


class Mix(NamedTuple):
    """A choice for each layer: bytes in all, and the sum of its sensitivities."""

    picks: tuple[int, ...]
    bytes: int
    cost: float


def best_mixes(costs: np.ndarray, sizes: np.ndarray) -> list[Mix]:
    """The mixes that no other one beats in both bytes and cost, smallest first.

    costs [layers, options], sizes [options] in bytes. Exact up to the rounding of a size to the 8192nd part
    of the largest table, upwards.
    """
    layers, options = costs.shape
    unit = max(1.0, layers * float(sizes.max()) / _STEPS)
    widths = np.ceil(sizes / unit).astype(int)
    least = np.full(layers * int(widths.max()) + 1, np.inf)
    least[0] = 0.0
    picked = np.zeros((layers, len(least)), dtype=np.int16)
    for layer in range(layers):
        best = np.full_like(least, np.inf)
        for option in range(options):
            moved = np.full_like(least, np.inf)
            moved[widths[option] :] = least[: len(least) - widths[option]] + costs[layer, option]
            better = moved < best
            best[better], picked[layer, better] = moved[better], option
        least = best
    front, bound = [], np.inf
    for room in range(len(least)):
        if least[room] < bound:
            bound = float(least[room])
            front.append(_mix(picked, widths, sizes, room, bound))
    return front


def _mix(picked: np.ndarray, widths: np.ndarray, sizes: np.ndarray, room: int, cost: float) -> Mix:
    picks: list[int] = []
    for layer in reversed(range(len(picked))):
        option = int(picked[layer, room])
        picks.append(option)
        room -= int(widths[option])
    picks.reverse()
    return Mix(tuple(picks), int(sizes[picks].sum()), cost)


def within(front: Sequence[Mix], budget: int) -> Mix | None:
    """The best mix of at most that many bytes."""
    fitting = [mix for mix in front if mix.bytes <= budget]
    return fitting[-1] if fitting else None


def layout_of(index: TolIndex, chosen: Mapping[int, Choice]) -> Layout:
    """A choice for each layer, not all of them dropped, as a layout."""
    kept = {layer: scheme for layer, scheme in chosen.items() if scheme is not None}
    return Layout(hidden_size=index.hidden_size, layers=list(kept), schemes=list(kept.values()))


def size_of(index: TolIndex, chosen: Mapping[int, Choice]) -> int:
    """Bytes of the files that `tol compress --allocation` makes of it, headers included, the index not."""
    found = layout_of(index, chosen)
    storage = Storage(layers=found.layers, schemes=found.schemes)
    whole = Layout.of(storage.without_ranks(), index.num_layers, index.hidden_size)
    return table_bytes(found, index.vocab_size, partitions_of(None, index.vocab_size, whole))
