"""Patches: rows that replace some of a table's while it is served. The table itself never changes.

A patch is one safetensors file: `ids` int64 [n], ascending, and `rows` fp32 [n, stored layers, hidden]; its
metadata names the table's index by SHA-256, has the SHA-256 of both tensors, and says what was done.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.tol.format.index import INDEX
from mlm_train.tol.format.index_file import read_index
from mlm_train.utils.files import open_regular, replace_file, sha256_of

FORMAT = "mlm-tol-patch-1"


@dataclass(frozen=True)
class Patch:
    """Replaced rows. ids: int64 [n]; rows: fp32 [n, layers, hidden] of `layers`; done: a line per change."""

    ids: Tensor
    rows: Tensor
    layers: list[int]
    done: list[str]

    def write(self, file: Path, table: Path) -> None:
        """Write the file; an old one is replaced at once. OSError where that is impossible."""
        tensors = {"ids": self.ids.contiguous(), "rows": self.rows.contiguous()}
        metadata = {
            "format": FORMAT,
            "table": sha256_of(table / INDEX),
            "sha256": _digest(self.ids, self.rows),
            "done": json.dumps(self.done),
        }
        replace_file(file, save(tensors, metadata))

    @classmethod
    def read(cls, file: str | Path, table: Path) -> Self:
        """Read a patch of this table. UserError for a damaged one, and for one of another table."""
        ids, rows, metadata = _contents(Path(file))
        if metadata["table"] != sha256_of(table / INDEX):
            raise UserError(f"{file} was made for another table than {table}: make it anew for this one")
        index = read_index(table)
        wanted = (len(ids), len(index.layers), index.hidden_size)
        if rows.shape != wanted:
            raise UserError(f"{file} has rows {list(rows.shape)}, and the table needs {list(wanted)}")
        return cls(ids, rows, index.layers, json.loads(metadata["done"]))


def operations(file: str | Path) -> list[str]:
    """What a patch does, a line per change. UserError for a damaged one."""
    found: list[str] = json.loads(_contents(Path(file))[2]["done"])
    return found


def _contents(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    open_regular(file).close()
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            ids, rows = opened.get_tensor("ids"), opened.get_tensor("rows")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a patch, or damaged: {error}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file} is not a patch: make one with `mlm-train tol patch create`")
    if metadata["sha256"] != _digest(ids, rows):
        raise UserError(f"{file} is damaged: its SHA-256 differs")
    return ids, rows, metadata


def _digest(ids: Tensor, rows: Tensor) -> str:
    digest = hashlib.sha256(ids.contiguous().numpy().tobytes())
    digest.update(rows.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Overlay:
    """All patches of a source, later ones over earlier ones."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._rows = {
            int(number): patch.rows[at] for patch in patches for at, number in enumerate(patch.ids.tolist())
        }
        self._ids = torch.tensor(sorted(self._rows), dtype=torch.int64)
        self._at = {layer: at for patch in patches for at, layer in enumerate(patch.layers)}

    def over(self, distinct: Tensor, dtype: torch.dtype, device: torch.device) -> "Overlaid | None":
        """What is patched of some ids [n] on the CPU, for values of that type and device; None: nothing."""
        if not self._rows:
            return None
        places = torch.isin(distinct, self._ids).nonzero().flatten()
        if not len(places):
            return None
        rows = torch.stack([self._rows[number] for number in distinct[places].tolist()])
        return Overlaid(places.to(device), rows.to(device, dtype), self._at)


class Overlaid(NamedTuple):
    """Positions [k] that are patched, their rows [k, stored layers, hidden], and a layer's place in a row."""

    places: Tensor
    rows: Tensor
    at: dict[int, int]

    def apply(self, values: Tensor, layer: int) -> Tensor:
        """values [n, hidden] of a layer, with the patched ones replaced."""
        return values.index_copy(0, self.places, self.rows[:, self.at[layer]])
