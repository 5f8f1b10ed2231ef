"""How FFN-M is executed in training: memory sources that compute it, all with equal gradients."""

from collections.abc import Callable, Mapping

from mlm_train.memory.per_token import PerToken
from mlm_train.memory.unique import Unique
from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemorySource

MODES: dict[str, Callable[[Mapping[int, MemoryBlock]], MemorySource]] = {
    "per_token": PerToken,
    "unique": Unique,
}


def make_source(mode: str, blocks: Mapping[int, MemoryBlock]) -> MemorySource:
    """The memory source of a mode (config field memory.mode) over a model's blocks."""
    return MODES[mode](blocks)


__all__ = ["MODES", "PerToken", "Unique", "make_source"]
