"""Which layer gets which bytes: the ways to store one, and the best mixes.

Sums of sensitivities over layers predict what a mix costs; the mix of least sum within a budget is the best.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mlm_train.tol.allocate.sensitivity import Choice
from mlm_train.tol.build.budget import bytes_of, headers, table_bytes
from mlm_train.tol.build.builder import partitions_of
from mlm_train.tol.format.index import TolIndex
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.format.schemes import GROUP, Scheme
from mlm_train.tol.lowrank.knapsack import Mix, Ways, best_mix

_RANKS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
_SIZES = 100  # of which the best mixes are shown


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


def ways_of(costs: np.ndarray, rows: int, hidden: int) -> list[Ways]:
    """Bytes and costs of every choice, for each layer; costs: [layers, choices(hidden)]."""
    sizes = np.array([bytes_of(one, rows, hidden) for one in choices(hidden)])
    return [Ways(sizes, each) for each in costs]


def best_kept(layers: Sequence[Ways], room: int) -> Mix | None:
    """The mix of least cost within so many bytes, headers apart; None where that keeps no layer."""
    mix = best_mix(layers, room)
    return mix if mix is not None and mix.bytes else None


def best_mixes(layers: Sequence[Ways]) -> list[Mix]:
    """Mixes that no other one beats in both bytes and cost, smallest first: the best of _SIZES even sizes."""
    largest = sum(int(one.bytes.max()) for one in layers)
    sizes = (largest * step // _SIZES for step in range(1, _SIZES + 1))
    found = (best_kept(layers, size) for size in sizes)
    return list(dict.fromkeys(mix for mix in found if mix is not None))


def layout_of(index: TolIndex, chosen: Mapping[int, Choice]) -> Layout:
    """A choice for each layer, not all of them dropped, as a layout."""
    kept = {layer: scheme for layer, scheme in chosen.items() if scheme is not None}
    return Layout(hidden_size=index.hidden_size, layers=list(kept), schemes=list(kept.values()))


def size_of(index: TolIndex, chosen: Mapping[int, Choice]) -> int:
    """Bytes of the files that `tol compress --allocation` makes of it, headers included, the index not."""
    found = layout_of(index, chosen)
    return table_bytes(found, index.vocab_size, _partitions(index, found))


def room_of(index: TolIndex, budget: int) -> int:
    """What a budget leaves for layers: without the headers of as many partitions as a bfloat16 table has."""
    whole = layout_of(index, dict.fromkeys(index.layers, Scheme(dtype="bfloat16")))
    return budget - headers(_partitions(index, whole))


def _partitions(index: TolIndex, layout: Layout) -> int:
    spec, rows = TableSpec(layers=layout.layers, schemes=layout.schemes), index.vocab_size
    largest = spec.largest(index.num_layers, index.hidden_size)
    return partitions_of(None, rows, largest.shape.file_bytes(rows))
