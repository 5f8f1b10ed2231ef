"""What each way to store each layer costs the model: its sensitivities, kept batch by batch.

A layer's sensitivity to a scheme is what the model's loss (nats a token) grows by when that layer alone is
stored so, or the mean KL divergence of its predictions from those with exact lookups, whichever is larger:
low rank costs far more loss than it moves predictions, and codes whose errors happen to lower the loss earn
nothing by it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mlm_train.errors import UserError
from mlm_train.model.source import MemoryReader
from mlm_train.model.transformer import Transformer
from mlm_train.tol.build.row_source import chunks_of
from mlm_train.tol.format.codec import decode, encode
from mlm_train.tol.format.schemes import Scheme, layout
from mlm_train.tol.lowrank.spectrum import Gram, Spectrum, scaled_basis
from mlm_train.tol.serve.reader import TableReader, projector
from mlm_train.utils.files import write_json, writing
from mlm_train.utils.records import Record, json_value, read_regular

_ROWS = 2048
Choice = Scheme | None  # None: the layer is not stored


def spectra_of(table: TableReader) -> dict[int, Spectrum]:
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

    def __init__(self, table: TableReader, spectra: dict[int, Spectrum]) -> None:
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


@dataclass
class Sums:
    """Over the first batches, nats, [layers, options] each."""

    divergences: np.ndarray
    losses: np.ndarray
    batches: int = 0

    @classmethod
    def zeros(cls, layers: int, options: int) -> Self:
        """Of none."""
        return cls(*np.zeros((2, layers, options)))


_Numbers = list[list[Annotated[float, Field(allow_inf_nan=False)]]]


class _Note(Record):
    """What the file of Notes holds."""

    about: str
    batches: int = Field(ge=0)
    divergences: _Numbers
    losses: _Numbers


class Notes:
    """What has been measured, in a hidden file beside the result, so that a study that was killed goes on.

    about: what the numbers hang on. Notes about anything else, or damaged ones, are as none.
    """

    def __init__(self, result: Path, about: Sequence[object]) -> None:
        self.result, self.path = result, result.with_name(f".{result.name}.measured")
        self._about = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def read(self) -> Sums | None:
        """What the last `write` gave."""
        try:
            note = _Note.model_validate(json_value(read_regular(self.path)))
            if note.about != self._about:
                return None
            return Sums(np.array(note.divergences), np.array(note.losses), note.batches)
        except (OSError, ValueError, UserError):
            return None

    def write(self, sums: Sums) -> None:
        """Keep them; JSON's decimals give every float64 back."""
        tree = {"about": self._about, "batches": sums.batches}
        numbers = {"divergences": sums.divergences.tolist(), "losses": sums.losses.tolist()}
        with writing(self.result):
            write_json(self.path, tree | numbers)

    def remove(self) -> None:
        """Once there is a result."""
        self.path.unlink(missing_ok=True)


@torch.inference_mode()
def measure(
    model: Transformer,
    trial: Trial,
    batches: Sequence[tuple[Tensor, Tensor]],
    options: Sequence[Choice],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    notes: Notes | None = None,
) -> np.ndarray:
    """Sensitivities [layers of the table, options], nats a token, over (ids, labels) [batch, sequence].

    With `notes` it goes on after the batches that they hold, to the same numbers.
    """
    layers = trial.table.index.layers
    sums = (notes and notes.read()) or Sums.zeros(len(layers), len(options))
    model.eval()
    for number in progress(range(sums.batches * len(layers), len(batches) * len(layers))):
        (ids, labels), position = batches[number // len(layers)], number % len(layers)
        if position == 0:
            trial.chosen = {}
            exact, loss = _predictions(model, trial, ids, labels)
        for column, option in enumerate(options):
            trial.chosen = {layers[position]: option}
            found, changed = _predictions(model, trial, ids, labels)
            divergence = F.kl_div(found, exact, reduction="sum", log_target=True)
            sums.divergences[position, column] += float(divergence)
            sums.losses[position, column] += changed - loss
        if position == len(layers) - 1:
            sums.batches += 1
            if notes is not None:
                notes.write(sums)
    trial.chosen = {}
    tokens = sum(int((labels >= 0).sum()) for _, labels in batches)
    return np.maximum(np.maximum(sums.losses, sums.divergences), 0.0) / tokens


def _predictions(model: Transformer, trial: Trial, ids: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Log probabilities [batch, sequence, vocabulary], and the sum of the labels' losses."""
    found = F.log_softmax(model(ids, trial).float(), dim=-1)
    return found, float(F.nll_loss(found.flatten(0, 1), labels.flatten(), reduction="sum"))
