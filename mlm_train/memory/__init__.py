"""How FFN-M is executed in training: memory sources that compute it, all with the same gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mlm_train.memory.per_token import PerTokenSource
from mlm_train.memory.table import RowSharing, TableSource
from mlm_train.memory.unique import UniqueSource
from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemorySource, Positions
from mlm_train.utils.extensions import find


class TrainingSource(MemorySource, Protocol):
    """A memory source that computes FFN-M, and counts its evaluations."""

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of a step on this rank, rows times layers, without recomputation.

        tokens: positions; distinct: distinct ids, summed over micro-batches.
        """
        ...


@dataclass(frozen=True)
class SourceOptions:
    """Options of a mode.

    positions: those of a micro-batch on this rank. For tables, precision: the autocast under which they are
    computed, outside the micro-batches; share: which rows this rank computes; tables: how many layers, the
    first ones, have a table (default: all), while "unique" computes the others; kept: how many of those, the
    first ones, keep their activations. device: default, the weights'.
    """

    positions: Positions = field(default_factory=Positions)
    precision: torch.autocast | None = None
    share: RowSharing | None = None
    tables: int | None = None
    kept: int = 0
    device: torch.device | None = None


Blocks = Mapping[int, MemoryBlock]  # by layer, on this rank


def _per_token(blocks: Blocks, options: SourceOptions) -> TrainingSource:
    return PerTokenSource(blocks)


def _unique(blocks: Blocks, options: SourceOptions) -> TrainingSource:
    return UniqueSource(blocks, options.positions)


def _table(blocks: Blocks, options: SourceOptions) -> TrainingSource:
    count = len(blocks) if options.tables is None else options.tables
    tabled, others = dict(list(blocks.items())[:count]), dict(list(blocks.items())[count:])
    other_layers = UniqueSource(others, options.positions) if others else None
    positions, precision, share = options.positions, options.precision, options.share
    kept, device = options.kept, options.device
    return TableSource(tabled, positions, precision, share, other_layers, kept, device)


# Names of config field memory.mode (config/choices.py lists them too).
MODES: dict[str, Callable[[Blocks, SourceOptions], TrainingSource]] = {
    "per_token": _per_token,
    "unique": _unique,
    "table": _table,
}


def make_source(mode: str, blocks: Blocks, options: SourceOptions | None = None) -> TrainingSource:
    """The memory source of a mode (config field memory.mode, decided) over a model's blocks."""
    assert mode != "auto", "memory.mode=auto is not decided"
    source: TrainingSource = find("memory.mode", mode, MODES)(blocks, options or SourceOptions())
    return source


__all__ = [
    "MODES",
    "PerTokenSource",
    "RowSharing",
    "SourceOptions",
    "TableSource",
    "TrainingSource",
    "UniqueSource",
    "make_source",
]
