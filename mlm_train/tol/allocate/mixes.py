"""The options for storing a layer, and the best mixes of them.

The sum of sensitivities over layers predicts the cost of a mix; the best mix within a budget has the least
sum.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mlm_train.tol.allocate.sensitivity import Choice
from mlm_train.tol.build.budget import besides_layers, bytes_of, table_bytes
from mlm_train.tol.build.builder import partitions_of
from mlm_train.tol.format.index import TolIndex
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.format.schemes import GROUP, Scheme
from mlm_train.tol.lowrank.knapsack import LayerOptions, Mix, best_mix

_RANKS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # of the hidden size
_SIZES = 100  # table sizes whose best mixes are shown


def choices(hidden: int) -> list[Choice]:
    """The options that are tried: dropping the layer, fewer bits, low rank, and low rank in fewer bits."""
    options: list[Choice] = [None, Scheme(dtype="bfloat16")]
    for size in (16, 24, 32, 48, 64, 96, 128):  # smaller ones may be free: layers are padded to 16 bytes
        options.append(Scheme(dtype="int4", group_size=size))
        options.append(Scheme(dtype="int4", group_size=size, symmetric=False))
    options.append(Scheme(dtype="int8", group_size=GROUP))
    # Ranks that fill their groups; smaller groups for small layers.
    group = min(GROUP, max(8, hidden // 16))
    ranks = sorted({max(group, round(hidden * part / group) * group) for part in _RANKS})
    for rank in ranks:
        if rank < hidden:
            options += [Scheme(dtype=dtype, rank=rank, group_size=group) for dtype in ("int4", "int8")]
    return options


def layer_options(costs: np.ndarray, rows: int, hidden: int) -> list[LayerOptions]:
    """Bytes and costs of every choice, for each layer; costs: [layers, choices(hidden)]."""
    sizes = np.array([bytes_of(choice, rows, hidden) for choice in choices(hidden)])
    return [LayerOptions(sizes, each) for each in costs]


def best_kept(layers: Sequence[LayerOptions], room: int) -> Mix | None:
    """The mix of least cost within `room` bytes without headers; None if that keeps no layer."""
    mix = best_mix(layers, room)
    return mix if mix is not None and mix.bytes else None


def best_mixes(layers: Sequence[LayerOptions]) -> list[Mix]:
    """The Pareto-optimal mixes by ascending bytes: the best of _SIZES evenly spaced sizes."""
    largest = sum(int(layer.bytes.max()) for layer in layers)
    sizes = (largest * step // _SIZES for step in range(1, _SIZES + 1))
    mixes = (best_kept(layers, size) for size in sizes)
    return list(dict.fromkeys(mix for mix in mixes if mix is not None))


def layout_of(index: TolIndex, chosen: Mapping[int, Choice]) -> Layout:
    """The layout of a choice for each layer, of which at least one is kept."""
    kept = {layer: scheme for layer, scheme in chosen.items() if scheme is not None}
    return Layout(
        hidden_size=index.hidden_size,
        layers=list(kept),
        schemes=list(kept.values()),
        embedding=index.embedding_dtype,
    )


def size_of(index: TolIndex, chosen: Mapping[int, Choice]) -> int:
    """Bytes of the table that `tol compress --allocation` writes, without the index."""
    layout = layout_of(index, chosen)
    return table_bytes(layout, index.vocab_size, _partitions(index, layout))


def room_of(index: TolIndex, budget: int) -> int:
    """The bytes that a budget leaves for layers: without the headers of a bfloat16 table's partitions."""
    rows, hidden = index.vocab_size, index.hidden_size
    plain = layout_of(index, dict.fromkeys(index.layers, Scheme(dtype="bfloat16")))
    return budget - besides_layers(index.embedding_dtype, rows, hidden, _partitions(index, plain))


def _partitions(index: TolIndex, layout: Layout) -> int:
    rows = index.vocab_size
    spec = TableSpec(layers=layout.layers, schemes=layout.schemes, embedding=layout.embedding)
    largest = spec.largest(index.num_layers, index.hidden_size)
    return partitions_of(None, rows, largest.shape.file_bytes(rows))
