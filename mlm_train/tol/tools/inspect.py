"""What a table holds: bytes, norms, spectra and likeness of its rows, from one pass over them."""

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
_HUGE = 1e15  # a Gram cannot take their squares


@dataclass(frozen=True)
class Sizes:
    """Bytes of the files, and what else would hold these numbers.

    bfloat16: the whole table, dropped layers too, in that type. ffn_m: the weights that the table stands
    for, in bfloat16; None without a model. other: headers, their padding, and the header of the bases.
    """

    bytes: int
    row: int
    other: int
    bfloat16: int
    ffn_m: int | None


@dataclass(frozen=True)
class Scored:
    """A token and its norm or cosine; text where a tokenizer is known."""

    id: int
    text: str | None
    value: float


@dataclass(frozen=True)
class Layer:
    """One stored layer, T [V, h].

    bytes: of its part of all rows, row_bytes each, and of its basis. error: the relative one that the index
    holds. norms: of rows, "mean", "median" and "max". singular_values: descending, h of them or the layer's
    rank. ranks: how many of them hold each of SHARES of the energy ||T||². stable_rank: ||T||² / s_1².
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
    """Whether tokens t and t + 1 have like rows: where `change` is below 1, storing differences would pay.

    consecutive, random: mean cosine of such pairs, and of all pairs. change: Σ||r_t+1 - r_t||² / Σ||r_t+1||².
    Rows of zeros have no direction and are left out; None where no pair is left.
    """

    consecutive: float | None
    random: float | None
    change: float | None


@dataclass(frozen=True)
class Neighbours:
    """A token, and those whose rows have the largest cosine with its own."""

    id: int
    text: str | None
    nearest: list[Scored]


@dataclass(frozen=True)
class Inspection:
    """All of it. `largest` and `neighbours` are of whole rows: the stored layers one after another."""

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
    """Read a table once, a chunk of rows at a time; beside it a Gram [h, h] of each layer in fp64 is held.

    model: one of the table's shape, for the size of FFN-M and the tokenizer in its folder. neighbours:
    tokens, as ids or as text, whose `top` nearest rows are looked for. verify: what of both is compared with
    their manifests first. Raises UserError for a damaged table, a model of another shape, an unknown token.
    """
    if top < 1:
        raise UserError(f"--top {top}: give at least 1")
    folder = Path(folder)
    table = TableReader.open_folder(folder, verify=verify)
    index = table.index
    found = None if model is None else find_model(model, verify)
    if found is not None:
        check_fits(folder, index, found.config)
    words = Vocabulary.of(index.vocab_size, found)
    nearest = _Nearest(table, [words.find(word) for word in neighbours], top)
    sums = _stream(table, folder, nearest)
    return Inspection(
        table=str(folder),
        vocab_size=index.vocab_size,
        num_layers=index.num_layers,
        hidden_size=index.hidden_size,
        sizes=_sizes(index, found),
        layers=_layers(index, sums, words, top),
        largest=_largest(sums.norms.square().sum(1).sqrt(), words, top),
        likeness=sums.pairs.likeness(),
        neighbours=[
            Neighbours(token, words.text(token), _scored(ids, cosines, words))
            for token, ids, cosines in nearest.found()
        ],
    )


class _Sums:
    """What is kept of the rows that went by. norms: fp64 [V, kept layers]."""

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
                raise UserError(f"{folder}: {what}; look at it with `mlm-train tol verify`")
            for gram, part in zip(sums.grams, parts, strict=True):
                gram.add(part)
            sums.norms[first:last] = norms
            units, lengths = _units(parts)
            sums.pairs.add(units, lengths)
            nearest.add(first, units)
            progress.show(last * index.row_bytes)
    return sums


def _values(table: TableReader, rows: Tensor) -> list[Tensor]:
    """The stored layers' numbers in rows: fp32 [n, hidden] each."""
    found = (table.values(rows, layer) for layer in table.index.layers)
    return [values.float() for values in found if values is not None]


def _units(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Whole rows at length 1 [n, layers * hidden], and their lengths [n]; rows of zeros stay so."""
    whole = torch.cat(list(parts), dim=1)
    lengths = whole.norm(dim=1)
    return whole.div_(torch.where(lengths == 0, 1.0, lengths).unsqueeze(1)), lengths


class _Pairs:
    """Cosines of consecutive rows, and of all pairs of rows, from chunks in the vocabulary's order."""

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)  # of unit rows
        self._rows = self._pairs = 0
        self._cosines = self._changes = self._energy = 0.0
        # The row before the first one: of zeros, so that it makes no pair.
        self._unit, self._length = torch.zeros(1, width), torch.zeros(1)

    def add(self, units: Tensor, lengths: Tensor) -> None:
        """Take in the next rows: units [n, width], lengths [n]."""
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
        """Of all rows taken in. ||Σu||² of n unit rows is n, and the cosine of each pair twice."""
        others = self._rows * (self._rows - 1)
        return Likeness(
            consecutive=self._cosines / self._pairs if self._pairs else None,
            random=(float(self._sum.square().sum()) - self._rows) / others if others else None,
            change=self._changes / self._energy if self._pairs else None,
        )


class _Nearest:
    """The best cosines so far with the rows of some tokens; equal ones go to the lower id."""

    def __init__(self, table: TableReader, tokens: Sequence[int], top: int) -> None:
        self._ids = torch.tensor(tokens, dtype=torch.int64)
        self._top = min(top, table.index.vocab_size - 1)
        self._units = torch.empty(len(tokens), len(table.index.layers) * table.index.hidden_size)
        for row, token in zip(self._units, tokens, strict=True):
            unit, length = _units(_values(table, table.range(token, token + 1)))
            if not length:
                raise UserError(
                    f"--neighbours: token {token} has a row of zeros, like no other; leave it out"
                )
            row.copy_(unit[0])
        self._best = torch.empty(len(tokens), 0)
        self._of = torch.empty(len(tokens), 0, dtype=torch.int64)

    def add(self, first: int, units: Tensor) -> None:
        """Compare with rows from `first` on: units [n, width]."""
        ids = torch.arange(first, first + len(units)).expand(len(self._ids), -1)
        cosines = (self._units @ units.T).masked_fill_(ids == self._ids.unsqueeze(1), -torch.inf)
        cosines, ids = torch.cat([self._best, cosines], dim=1), torch.cat([self._of, ids], dim=1)
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, : self._top]
        self._best, self._of = cosines.gather(1, order), ids.gather(1, order)

    def found(self) -> Iterable[tuple[int, list[int], list[float]]]:
        """Each token, its nearest, and their cosines."""
        return zip(self._ids.tolist(), self._of.tolist(), self._best.tolist(), strict=True)


def _sizes(index: TolIndex, model: ModelFolder | None) -> Sizes:
    rows = index.vocab_size * index.row_bytes
    bases = sum(_basis_bytes(field, index.hidden_size) for field in index.fields)
    return Sizes(
        bytes=index.bytes,
        row=index.row_bytes,
        other=index.bytes - rows - bases,
        bfloat16=index.vocab_size * index.num_layers * index.hidden_size * _BFLOAT16,
        ffn_m=None if model is None else count_parameters(model.config).ffn_m * _BFLOAT16,
    )


def _basis_bytes(field: Encoding, hidden: int) -> int:
    return (field.rank or 0) * hidden * BASIS_ITEM


def _layers(index: TolIndex, sums: _Sums, words: Vocabulary, top: int) -> list[Layer]:
    hidden, console = index.hidden_size, Console(stderr=True)
    errors = index.errors or [None] * len(index.layers)
    stored = zip(index.layers, index.fields, errors, sums.grams, sums.norms.unbind(1), strict=True)
    shown = track(
        stored,
        "singular values",
        total=len(index.layers),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    layers = []
    for layer, field, error, gram, norms in shown:
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
                largest=_largest(norms, words, top),
                singular_values=values.tolist(),
                ranks={
                    f"{100 * share:g}%": int((kept < share * energy).sum()) + 1 if energy else 0
                    for share in SHARES
                },
                stable_rank=energy / float(energies[0]) if energy else 0.0,
            )
        )
    return layers


def _largest(norms: Tensor, words: Vocabulary, top: int) -> list[Scored]:
    """The tokens of largest norm [V]; of equal ones the lower id first."""
    values, ids = norms.sort(descending=True, stable=True)
    return _scored(ids[:top].tolist(), values[:top].tolist(), words)


def _scored(ids: Iterable[int], values: Iterable[float], words: Vocabulary) -> list[Scored]:
    return [Scored(token, words.text(token), value) for token, value in zip(ids, values, strict=True)]
