"""Sensitivities: the cost to the model of each option for storing each layer, measured batch by batch.

A layer's sensitivity to a scheme is the increase of the model's loss (nats per token) when only that layer is
stored so, or the mean KL divergence of its predictions from those with exact lookups, whichever is larger:
low rank raises the loss far more than it moves predictions, and quantisation errors that happen to lower the
loss must not be rewarded.
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


def spectra_of(table: TableReader, weights: Tensor | None = None) -> dict[int, Spectrum]:
    """The spectrum of each stored layer; reads the table once per layer.

    weights: what each row's squared error counts, fp32 [vocabulary]; None: all alike.
    """
    return {layer: spectrum_of(table, layer, weights) for layer in table.index.layers}


def spectrum_of(table: TableReader, layer: int, weights: Tensor | None = None) -> Spectrum:
    """The spectrum of a stored layer; weights as in spectra_of."""
    gram = Gram(table.index.hidden_size)
    for first, last in chunks_of(0, table.index.vocab_size, _ROWS):
        values = table.values(table.range(first, last), layer)
        assert values is not None
        gram.add(values, None if weights is None else weights[first:last])
    return Spectrum.of(gram)


class Trial:
    """A memory source over a table that reads the layers in `chosen` as if stored by those schemes."""

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
        """A reader for ids [batch, sequence]; rows of the previous ids are reused."""
        if self._ids is None or not torch.equal(self._ids, ids):
            distinct, self._inverse = ids.flatten().unique(return_inverse=True)
            rows = self.table.rows(distinct.cpu())
            values = {layer: self.table.values(rows, layer) for layer in self.table.index.layers}
            self._exact = {layer: stored.float() for layer, stored in values.items() if stored is not None}
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
        """Values [n, hidden] after encoding and decoding by the scheme."""
        hidden = values.shape[1]
        basis = None if scheme.rank is None else self._bases[layer][: scheme.rank]
        out = torch.empty(len(values), scheme.bytes(hidden), dtype=torch.uint8)
        encode(scheme, values if basis is None else values @ projector(basis), out)
        stored = decode(layout([scheme], hidden)[0], out, hidden).float()
        return stored if basis is None else stored @ basis


@dataclass
class Sums:
    """Sums over the first `batches` batches, in nats, [layers, options] each."""

    divergences: np.ndarray
    losses: np.ndarray
    batches: int = 0

    @classmethod
    def zeros(cls, layers: int, options: int) -> Self:
        """The sums of no batch."""
        return cls(*np.zeros((2, layers, options)))


_Matrix = list[list[Annotated[float, Field(allow_inf_nan=False)]]]


class _Note(Record):
    """The file of Notes."""

    about: str
    batches: int = Field(ge=0)
    divergences: _Matrix
    losses: _Matrix


class Notes:
    """Sums measured so far, in a hidden file beside the result, from which a killed study resumes.

    about: everything that the sums depend on. A file about anything else, or a damaged one, is ignored.
    """

    def __init__(self, result: Path, about: Sequence[object]) -> None:
        self.result, self.path = result, result.with_name(f".{result.name}.measured")
        self._about = hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def read(self) -> Sums | None:
        """The sums of the last `write`; None if there are none for this study."""
        try:
            note = _Note.model_validate(json_value(read_regular(self.path)))
            if note.about != self._about:
                return None
            return Sums(np.array(note.divergences), np.array(note.losses), note.batches)
        except (OSError, ValueError, UserError):
            return None

    def write(self, sums: Sums) -> None:
        """Replace the file; JSON preserves every float64 exactly."""
        tree = {"about": self._about, "batches": sums.batches}
        matrices = {"divergences": sums.divergences.tolist(), "losses": sums.losses.tolist()}
        with writing(self.result):
            write_json(self.path, tree | matrices)

    def remove(self) -> None:
        """Remove the file, once there is a result."""
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
    """Sensitivities [layers of the table, options] in nats per token, over (ids, labels) [batch, sequence].

    `notes`: resumes after the batches that they hold, to identical results.
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
            changed, changed_loss = _predictions(model, trial, ids, labels)
            divergence = F.kl_div(changed, exact, reduction="sum", log_target=True)
            sums.divergences[position, column] += float(divergence)
            sums.losses[position, column] += changed_loss - loss
        if position == len(layers) - 1:
            sums.batches += 1
            if notes is not None:
                notes.write(sums)
    trial.chosen = {}
    tokens = sum(int((labels >= 0).sum()) for _, labels in batches)
    return np.maximum(np.maximum(sums.losses, sums.divergences), 0.0) / tokens


def _predictions(model: Transformer, trial: Trial, ids: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Log probabilities [batch, sequence, vocabulary], and the sum of the labels' losses."""
    log_probs = F.log_softmax(model(ids, trial).float(), dim=-1)
    return log_probs, float(F.nll_loss(log_probs.flatten(0, 1), labels.flatten(), reduction="sum"))
