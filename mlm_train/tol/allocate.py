"""Which layer gets which bytes: what each way to store each layer costs the model, and the best mix.

A layer's sensitivity to a scheme is what the model's loss (nats a token) grows by when that layer alone is
stored so, or the mean KL divergence of its predictions from those with exact lookups, whichever is larger:
low rank costs far more loss than it moves predictions, and codes whose
errors happen to lower the loss earn nothing by it. Sums over layers predict a mix; the mixes of least sum
for every number of bytes are found by dynamic programming.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlm_train.model.source import MemoryReader
from mlm_train.model.transformer import Transformer
from mlm_train.tol.build import partitions_of
from mlm_train.tol.codec import GROUP, Scheme, decode, encode, layout
from mlm_train.tol.compute import chunks_of
from mlm_train.tol.format import BASIS_ITEM, TolIndex
from mlm_train.tol.lowrank import table_bytes
from mlm_train.tol.spectrum import Gram, Spectrum, scaled_basis
from mlm_train.tol.state import Layout, Storage
from mlm_train.tol.table import Table, projector

_ROWS = 2048
_RANKS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
_STEPS = 8192  # of the dynamic programming's bytes
DROPPED = None  # the scheme of a layer that is not stored
Choice = Scheme | None


def choices(hidden: int) -> list[Choice]:
    """The ways to store a layer that are tried: dropped, fewer bits, low rank, and low rank in fewer bits."""
    found: list[Choice] = [DROPPED, Scheme(dtype="bfloat16")]
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


def spectra_of(table: Table) -> dict[int, Spectrum]:
    """The spectrum of each stored layer, by one pass over the table for each."""
    found = {}
    for layer in table.index.layers:
        gram = Gram(table.index.hidden_size)
        for first, last in chunks_of(0, table.index.vocab_size, _ROWS):
            values = table.values(table.range(first, last), layer)
            assert values is not None
            gram.add(values)
        found[layer] = Spectrum.of(gram)
    return found


class Trial:
    """A memory source over a table, in which some layers are as if they were stored otherwise."""

    def __init__(self, table: Table, spectra: dict[int, Spectrum]) -> None:
        self.table = table
        rows, hidden = table.index.vocab_size, table.index.hidden_size
        self._bases = {
            layer: scaled_basis(spectrum, hidden, rows).half().float() for layer, spectrum in spectra.items()
        }
        self.chosen: dict[int, Choice] = {}
        self._ids: Tensor | None = None
        self._exact: dict[int, Tensor] = {}

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """A reader of ids [batch, sequence]; the same ids again are not read again."""
        if self._ids is None or not torch.equal(self._ids, ids):
            distinct, self._inverse = ids.flatten().unique(return_inverse=True)
            rows = self.table.rows(distinct.cpu())
            values = {layer: self.table.values(rows, layer) for layer in self.table.index.layers}
            self._exact = {layer: one.float() for layer, one in values.items() if one is not None}
            self._ids = ids

        def read(layer: int) -> Tensor:
            exact = self._exact.get(layer)
            if exact is None or (layer in self.chosen and self.chosen[layer] is None):
                return torch.zeros_like(x0)
            scheme = self.chosen.get(layer)
            values = exact if scheme is None else self._as_stored(scheme, exact, layer)
            return values.to(x0.device, x0.dtype).index_select(0, self._inverse).view(x0.shape)

        return read

    def _as_stored(self, scheme: Scheme, values: Tensor, layer: int) -> Tensor:
        """Numbers [n, hidden] after a way through the scheme."""
        hidden = values.shape[1]
        basis = None if scheme.rank is None else self._bases[layer][: scheme.rank]
        out = torch.empty(len(values), scheme.bytes(hidden), dtype=torch.uint8)
        encode(scheme, values if basis is None else values @ projector(basis), out)
        stored = decode(layout([scheme], hidden)[0], out, hidden).float()
        return stored if basis is None else stored @ basis


@torch.inference_mode()
def measure(
    model: Transformer,
    trial: Trial,
    batches: Sequence[tuple[Tensor, Tensor]],
    options: Sequence[Choice],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> np.ndarray:
    """Sensitivities [layers of the table, options], nats a token, over (ids, labels) [batch, sequence]."""
    layers = trial.table.index.layers
    divergences, losses = np.zeros((2, len(layers), len(options)))
    model.eval()
    for number in progress(range(len(batches) * len(layers))):
        (ids, labels), position = batches[number // len(layers)], number % len(layers)
        if position == 0:
            trial.chosen = {}
            exact, loss = _predictions(model, trial, ids, labels)
        for column, option in enumerate(options):
            trial.chosen = {layers[position]: option}
            found, changed = _predictions(model, trial, ids, labels)
            divergence = F.kl_div(found, exact, reduction="sum", log_target=True)
            divergences[position, column] += float(divergence)
            losses[position, column] += changed - loss
    trial.chosen = {}
    tokens = sum(int((labels >= 0).sum()) for _, labels in batches)
    return np.maximum(np.maximum(losses, divergences), 0.0) / tokens


def _predictions(model: Transformer, trial: Trial, ids: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Log probabilities [batch, sequence, vocabulary], and the sum of the labels' losses."""
    found = F.log_softmax(model(ids, trial).float(), dim=-1)
    return found, float(F.nll_loss(found.flatten(0, 1), labels.flatten(), reduction="sum"))


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
