"""FFN-M at every position, as in the paper: the reference."""

from collections.abc import Mapping

from torch import Tensor

from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemoryReader


class PerTokenSource:
    """A memory source that computes FFN_M(N_m(x0)) for each position."""

    def __init__(self, blocks: Mapping[int, MemoryBlock]) -> None:
        self.blocks = blocks

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """x0 [batch, sequence, hidden]; ids are not used."""
        return lambda layer: self.blocks[layer].ffn_m_of_micro_batch(x0)

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of a step, rows times layers; `tokens`: positions."""
        return len(self.blocks) * tokens
