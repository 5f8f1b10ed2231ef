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
    """A memory source that computes, and counts what it computes."""

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of a step here, rows times layers; what is computed again left out.

        tokens: positions; distinct: distinct ids, summed over micro-batches.
        """
        ...


@dataclass(frozen=True)
class SourceOptions:
    """What a mode is told beside the blocks.

    positions: which of them are on this process. For tables: `precision`, the autocast they are computed
    under, outside the micro-batches; `share`, whose rows; `tables`, how many layers have one (default: all),
    the first of the blocks: the others are computed as by "unique"; `kept`, how many of those with one, the
    first, keep their activations.
    """

    positions: Positions = field(default_factory=Positions)
    precision: torch.autocast | None = None
    share: RowSharing | None = None
    tables: int | None = None
    kept: int = 0


Blocks = Mapping[int, MemoryBlock]  # this rank's, by layer


def _per_token(blocks: Blocks, options: SourceOptions) -> TrainingSource:
    return PerTokenSource(blocks)


def _unique(blocks: Blocks, options: SourceOptions) -> TrainingSource:
    return UniqueSource(blocks, options.positions)


def _table(blocks: Blocks, options: SourceOptions) -> TrainingSource:
    count = len(blocks) if options.tables is None else options.tables
    first, others = dict(list(blocks.items())[:count]), dict(list(blocks.items())[count:])
    rest = UniqueSource(others, options.positions) if others else None
    return TableSource(first, options.positions, options.precision, options.share, rest, options.kept)


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
