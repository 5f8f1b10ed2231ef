"""Statistics of a table: sizes, norms, spectra and similarity of its rows, from one pass over them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mlm_train.checkpoint.reading.logical_folder import ModelFolder, find_model
from mlm_train.errors import UserError
from mlm_train.model.counts import count_parameters
from mlm_train.tol.build.row_source import chunks_of
from mlm_train.tol.format.index import BASIS_ITEM, TolIndex, check_fits
from mlm_train.tol.format.schemes import Encoding
from mlm_train.tol.lowrank.spectrum import Gram, Spectrum
from mlm_train.tol.serve.reader import TableReader
from mlm_train.tol.tools.verify import CHUNK_ROWS
from mlm_train.tol.tools.vocabulary import Vocabulary
from mlm_train.utils.checks import Check
from mlm_train.utils.progress import ByteProgress

SHARES = (0.9, 0.99, 0.999)  # of a layer's energy
_BFLOAT16 = 2
_HUGE = 1e15  # larger values overflow a Gram in fp32


@dataclass(frozen=True)
class Sizes:
    """Sizes in bytes, and those of the alternatives.

    bytes: of the files without the index. row: of a row. embedding: of x0 in a row, 0 without it. other:
    headers with padding, and the header of the bases. bfloat16: of a table of all layers in that type. ffn_m:
    of the weights that the table replaces, in bfloat16; None without a model.
    """

    bytes: int
    row: int
    embedding: int
    other: int
    bfloat16: int
    ffn_m: int | None


@dataclass(frozen=True)
class Scored:
    """A token and its norm or cosine; text: None without a tokenizer."""

    id: int
    text: str | None
    value: float


@dataclass(frozen=True)
class Layer:
    """One stored layer, T [V, h].

    bytes: of its part of all rows, row_bytes each, and of its basis. error: relative, from the index. norms:
    "mean", "median" and "max" over rows. singular_values: descending, h of them or the layer's rank. ranks:
    how many of them hold each of SHARES of the energy ||T||². stable_rank: ||T||² / s_1².
    """

    layer: int
    dtype: str
    rank: int | None
    group_size: int | None
    row_bytes: int
    bytes: int
    error: float | None
    norms: dict[str, float]
    largest: list[Scored]
    singular_values: list[float]
    ranks: dict[str, int]
    stable_rank: float


@dataclass(frozen=True)
class Likeness:
    """Similarity of the rows of tokens t and t + 1; if `change` is below 1, storing differences would pay.

    consecutive, random: mean cosine of such pairs, and of all pairs. change: Σ||r_t+1 - r_t||² / Σ||r_t+1||².
    Rows of zeros have no direction and are left out; None if no pair is left.
    """

    consecutive: float | None
    random: float | None
    change: float | None


@dataclass(frozen=True)
class Neighbours:
    """A token, and the tokens whose rows have the largest cosine with its row."""

    id: int
    text: str | None
    nearest: list[Scored]


@dataclass(frozen=True)
class Inspection:
    """The result of inspect_tol. `largest` and `neighbours` are of whole rows: all layers, concatenated."""

    table: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    sizes: Sizes
    layers: list[Layer]
    largest: list[Scored]
    likeness: Likeness
    neighbours: list[Neighbours]


def inspect_tol(
    folder: str | Path,
    model: str | Path | None = None,
    top: int = 10,
    neighbours: Sequence[str] = (),
    verify: Check = "sizes",
) -> Inspection:
    """Compute statistics of a table in one pass over its rows; memory: an fp64 Gram [h, h] per layer.

    model: one of the table's shape, for the size of FFN-M and the tokenizer in its folder. neighbours:
    tokens, as ids or text, whose `top` nearest rows are searched. verify: how much of both is checked first.
    Raises UserError for a damaged table, a model of another shape, an unknown token.
    """
    if top < 1:
        raise UserError(f"--top {top}: give at least 1")
    folder = Path(folder)
    table = TableReader.open_folder(folder, verify=verify)
    index = table.index
    model_folder = None if model is None else find_model(model, verify)
    if model_folder is not None:
        check_fits(folder, index, model_folder.config)
    vocabulary = Vocabulary.of(index.vocab_size, model_folder)
    nearest = _Nearest(table, [vocabulary.find(token, "--neighbours") for token in neighbours], top)
    sums = _stream(table, folder, nearest)
    return Inspection(
        table=str(folder),
        vocab_size=index.vocab_size,
        num_layers=index.num_layers,
        hidden_size=index.hidden_size,
        sizes=_sizes(index, model_folder),
        layers=_layers(index, sums, vocabulary, top),
        largest=_largest(sums.norms.square().sum(1).sqrt(), vocabulary, top),
        likeness=sums.pairs.likeness(),
        neighbours=[
            Neighbours(token, vocabulary.text(token), _scored(ids, cosines, vocabulary))
            for token, ids, cosines in nearest.results()
        ],
    )


class _Sums:
    """Statistics accumulated over the rows. norms: fp64 [V, kept layers]."""

    def __init__(self, index: TolIndex) -> None:
        kept = len(index.layers)
        self.grams = [Gram(index.hidden_size) for _ in range(kept)]
        self.norms = torch.zeros(index.vocab_size, kept, dtype=torch.float64)
        self.pairs = _Pairs(kept * index.hidden_size)


def _stream(table: TableReader, folder: Path, nearest: "_Nearest") -> _Sums:
    index = table.index
    sums = _Sums(index)
    with ByteProgress("inspect", index.vocab_size * index.row_bytes) as progress:
        for first, last in chunks_of(0, index.vocab_size, CHUNK_ROWS):
            parts = _values(table, table.range(first, last))
            norms = torch.stack([part.norm(dim=1) for part in parts], dim=1)
            if not (norms < _HUGE).all():
                what = f"rows [{first}, {last}) have NaN, infinite or huge values (above {_HUGE:.0e})"
                raise UserError(f"{folder}: {what}; check it with `mlm-train tol verify`")
            for gram, part in zip(sums.grams, parts, strict=True):
                gram.add(part)
            sums.norms[first:last] = norms
            units, lengths = _units(parts)
            sums.pairs.add(units, lengths)
            nearest.add(first, units)
            progress.show(last * index.row_bytes)
    return sums


def _values(table: TableReader, rows: Tensor) -> list[Tensor]:
    """The values of each stored layer in rows: fp32 [n, hidden] each."""
    decoded = (table.values(rows, layer) for layer in table.index.layers)
    return [values.float() for values in decoded if values is not None]


def _units(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Normalised whole rows [n, layers * hidden], and their norms [n]; rows of zeros stay zero."""
    whole = torch.cat(list(parts), dim=1)
    lengths = whole.norm(dim=1)
    return whole.div_(torch.where(lengths == 0, 1.0, lengths).unsqueeze(1)), lengths


class _Pairs:
    """Cosines of consecutive rows, and of all pairs of rows, from chunks in order."""

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)  # of unit rows
        self._rows = self._pairs = 0
        self._cosines = self._changes = self._energy = 0.0
        # The row before the first one: zeros, which make no pair.
        self._unit, self._length = torch.zeros(1, width), torch.zeros(1)

    def add(self, units: Tensor, lengths: Tensor) -> None:
        """Add the next rows: units [n, width], lengths [n]."""
        self._sum += units.sum(0, dtype=torch.float64)
        self._rows += int(lengths.count_nonzero())
        starts = torch.linalg.vecdot(self._unit, units[:1])
        cosines = torch.cat([starts, torch.linalg.vecdot(units[:-1], units[1:])]).double()
        before, after = torch.cat([self._length, lengths[:-1]]).double(), lengths.double()
        changes = before.square() + after.square() - 2 * before * after * cosines
        pairs = (before > 0) & (after > 0)
        self._pairs += int(pairs.sum())
        self._cosines += float(cosines[pairs].sum())
        self._changes += float(changes[pairs].sum())
        self._energy += float(after[pairs].square().sum())
        self._unit, self._length = units[-1:].clone(), lengths[-1:]

    def likeness(self) -> Likeness:
        """The similarity over all added rows."""
        # ||Σu||² of n unit rows is n, plus twice the cosine of each pair.
        others = self._rows * (self._rows - 1)
        return Likeness(
            consecutive=self._cosines / self._pairs if self._pairs else None,
            random=(float(self._sum.square().sum()) - self._rows) / others if others else None,
            change=self._changes / self._energy if self._pairs else None,
        )


class _Nearest:
    """The `top` best cosines so far with the rows of given tokens; ties go to the lower id."""

    def __init__(self, table: TableReader, tokens: Sequence[int], top: int) -> None:
        self._ids = torch.tensor(tokens, dtype=torch.int64)
        self._top = min(top, table.index.vocab_size - 1)
        self._units = torch.empty(len(tokens), len(table.index.layers) * table.index.hidden_size)
        for row, token in zip(self._units, tokens, strict=True):
            unit, length = _units(_values(table, table.range(token, token + 1)))
            if not length:
                raise UserError(
                    f"--neighbours: token {token} has a row of zeros, without a direction; leave it out"
                )
            row.copy_(unit[0])
        self._best = torch.empty(len(tokens), 0)
        self._best_ids = torch.empty(len(tokens), 0, dtype=torch.int64)

    def add(self, first: int, units: Tensor) -> None:
        """Compare with rows from `first` on: units [n, width]."""
        ids = torch.arange(first, first + len(units)).expand(len(self._ids), -1)
        cosines = (self._units @ units.T).masked_fill_(ids == self._ids.unsqueeze(1), -torch.inf)
        cosines, ids = torch.cat([self._best, cosines], dim=1), torch.cat([self._best_ids, ids], dim=1)
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, : self._top]
        self._best, self._best_ids = cosines.gather(1, order), ids.gather(1, order)

    def results(self) -> Iterable[tuple[int, list[int], list[float]]]:
        """Each token, its nearest ids, and their cosines."""
        return zip(self._ids.tolist(), self._best_ids.tolist(), self._best.tolist(), strict=True)


def _sizes(index: TolIndex, model: ModelFolder | None) -> Sizes:
    rows = index.vocab_size * index.row_bytes
    bases = sum(_basis_bytes(field, index.hidden_size) for field in index.fields)
    return Sizes(
        bytes=index.bytes,
        row=index.row_bytes,
        embedding=0 if index.embedding is None else index.embedding.bytes(index.hidden_size),
        other=index.bytes - rows - bases,
        bfloat16=index.vocab_size * index.num_layers * index.hidden_size * _BFLOAT16,
        ffn_m=None if model is None else count_parameters(model.config).ffn_m * _BFLOAT16,
    )


def _basis_bytes(field: Encoding, hidden: int) -> int:
    return (field.rank or 0) * hidden * BASIS_ITEM


def _layers(index: TolIndex, sums: _Sums, vocabulary: Vocabulary, top: int) -> list[Layer]:
    hidden, console = index.hidden_size, Console(stderr=True)
    errors = index.errors or [None] * len(index.layers)
    stored = zip(index.layers, index.fields, errors, sums.grams, sums.norms.unbind(1), strict=True)
    tracked = track(
        stored,
        "singular values",
        total=len(index.layers),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    layers = []
    for layer, field, error, gram, norms in tracked:
        row_bytes = sum(field.sizes(hidden)) if index.encodings is None else field.bytes(hidden)
        values = Spectrum.of(gram).values[: field.width(hidden)]  # beyond a layer's rank there is only noise
        energies = values.square()
        energy = float(energies.sum())
        kept = energies.cumsum(0)
        layers.append(
            Layer(
                layer=layer,
                dtype=field.dtype,
                rank=field.rank,
                group_size=field.group_size,
                row_bytes=row_bytes,
                bytes=index.vocab_size * row_bytes + _basis_bytes(field, hidden),
                error=error,
                norms={
                    "mean": float(norms.mean()),
                    "median": float(norms.quantile(0.5)),
                    "max": float(norms.max()),
                },
                largest=_largest(norms, vocabulary, top),
                singular_values=values.tolist(),
                ranks={
                    f"{100 * share:g}%": int((kept < share * energy).sum()) + 1 if energy else 0
                    for share in SHARES
                },
                stable_rank=energy / float(energies[0]) if energy else 0.0,
            )
        )
    return layers


def _largest(norms: Tensor, vocabulary: Vocabulary, top: int) -> list[Scored]:
    """The tokens of largest norm, norms [V]; ties by ascending id."""
    values, ids = norms.sort(descending=True, stable=True)
    return _scored(ids[:top].tolist(), values[:top].tolist(), vocabulary)


def _scored(ids: Iterable[int], values: Iterable[float], vocabulary: Vocabulary) -> list[Scored]:
    return [Scored(token, vocabulary.text(token), value) for token, value in zip(ids, values, strict=True)]
