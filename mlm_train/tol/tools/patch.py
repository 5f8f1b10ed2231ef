"""Making patches: rows scaled, silenced, replaced by another token's, or given."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.tol.serve.patch import Patch
from mlm_train.tol.serve.reader import TableReader
from mlm_train.tol.tools.vocabulary import Vocabulary


class PatchMaker:
    """Collects changes of a table's rows; a later change of a token starts from the earlier one's result."""

    def __init__(self, table: Path, vocabulary: Vocabulary, layers: Sequence[int] | None = None) -> None:
        """layers: those that change, of the stored ones (default: all)."""
        self._table, self._vocabulary = TableReader.open_folder(table), vocabulary
        self._layers = self._table.index.layers
        chosen = self._layers if layers is None else layers
        self._changes = torch.tensor([layer in chosen for layer in self._layers])
        self._where = "" if layers is None else f" in layers {', '.join(map(str, sorted(layers)))}"
        self._rows: dict[int, Tensor] = {}
        self._done: list[str] = []

    def scale(self, name: str, factor: float) -> None:
        """Multiply a token's row; name: an id, or the token's text."""
        self._change(name, f"scaled by {factor:g}", lambda row: row * factor)

    def silence(self, name: str) -> None:
        """Set a token's row to zero."""
        self._change(name, "silenced", torch.zeros_like)

    def copy(self, name: str, other: str) -> None:
        """Give a token the row of another."""
        source = self._vocabulary.find(other, "--copy")
        self._change(name, f"replaced by {self._shown(source)}", lambda _: self._row(source))

    def replace(self, file: str) -> None:
        """Take the rows of a safetensors file: `ids` int64 [n], `rows` [n, stored layers, hidden]."""
        shape = (len(self._layers), self._table.index.hidden_size)
        try:
            tensors = load_file(file)
            ids, rows = tensors["ids"], tensors["rows"].float()
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"--rows {file}: needs tensors ids and rows: {error}") from None
        if ids.dtype != torch.int64 or rows.shape != (len(ids), *shape):
            raise UserError(f"--rows {file}: ids must be int64 [n] and rows [n, {shape[0]}, {shape[1]}]")
        if not rows.isfinite().all():
            raise UserError(f"--rows {file}: a value is not finite")
        for number, row in zip(ids.tolist(), rows, strict=True):
            self._change(str(number), f"edited ({Path(file).name})", lambda _, row=row: row)  # type: ignore[misc]

    def give(self, number: int, row: Tensor, what: str) -> None:
        """Give a token a row fp32 [stored layers, hidden], of which the chosen layers are taken."""
        self._change(str(number), what, lambda _: row)

    def made(self) -> Patch:
        """The patch of all changes. UserError where there are none."""
        if not self._rows:
            raise UserError("a patch needs a change: --scale, --silence, --copy or --rows")
        ids = sorted(self._rows)
        rows = torch.stack([self._rows[number] for number in ids])
        return Patch(torch.tensor(ids), rows, self._layers, self._done)

    def _change(self, name: str, what: str, of: Callable[[Tensor], Tensor]) -> None:
        number = self._vocabulary.find(name, "token")
        old = self._row(number)
        self._rows[number] = torch.where(self._changes[:, None], of(old), old)
        self._done.append(f"{self._shown(number)}: {what}{self._where}")

    def _row(self, number: int) -> Tensor:
        if number in self._rows:
            return self._rows[number]
        encoded = self._table.rows(torch.tensor([number]))
        values = [self._table.values(encoded, layer) for layer in self._layers]
        return torch.stack([value[0].float() for value in values if value is not None])

    def _shown(self, number: int) -> str:
        text = self._vocabulary.text(number)
        return str(number) if text is None else f"{number} {text!r}"
