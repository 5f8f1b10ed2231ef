"""How FFN-M is executed in training: memory sources that compute it, all with the same gradients."""

from collections.abc import Mapping

import torch

from mlm_train.memory.per_token import PerTokenSource
from mlm_train.memory.table import RowSharing, TableSource
from mlm_train.memory.unique import UniqueSource
from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import Positions

TrainingSource = PerTokenSource | UniqueSource | TableSource


def make_source(
    mode: str,
    blocks: Mapping[int, MemoryBlock],
    positions: Positions | None = None,
    precision: torch.autocast | None = None,
    share: RowSharing | None = None,
    tables: int | None = None,
    kept: int = 0,
) -> TrainingSource:
    """The memory source of a mode (config field memory.mode, decided) over a model's blocks.

    For tables: `precision`, the autocast they are computed under, outside the micro-batches; `share`,
    whose rows; `tables`, how many layers have one (default: all), the first of `blocks`: the others are
    computed as by "unique"; `kept`, how many of those with one, the first, keep their activations.
    """
    if mode == "per_token":
        return PerTokenSource(blocks)
    positions = positions or Positions()
    if mode == "unique":
        return UniqueSource(blocks, positions)
    assert mode == "table", f"memory.mode={mode} is not decided"
    count = len(blocks) if tables is None else tables
    first, others = dict(list(blocks.items())[:count]), dict(list(blocks.items())[count:])
    return TableSource(
        first, positions, precision, share, UniqueSource(others, positions) if others else None, kept
    )


__all__ = ["PerTokenSource", "RowSharing", "TableSource", "TrainingSource", "UniqueSource", "make_source"]
