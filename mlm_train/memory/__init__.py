"""How FFN-M is executed in training: memory sources that compute it, all with equal gradients."""

from collections.abc import Mapping

import torch

from mlm_train.memory.per_token import PerToken
from mlm_train.memory.table import Table
from mlm_train.memory.unique import Unique
from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemorySource, Positions


def make_source(
    mode: str,
    blocks: Mapping[int, MemoryBlock],
    positions: Positions | None = None,
    precision: torch.autocast | None = None,
) -> MemorySource:
    """The memory source of a mode (config field memory.mode) over a model's blocks.

    `precision`: the autocast that tables are computed under, outside the micro-batches.
    """
    if mode == "table":
        return Table(blocks, positions or Positions(), precision or torch.autocast("cpu", enabled=False))
    if mode == "unique":
        return Unique(blocks, positions or Positions())
    return PerToken(blocks)


__all__ = ["PerToken", "Table", "Unique", "make_source"]
