"""The flat tensors of AdamW's fp32 weights and moments, and the positions of parameters in them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from mlm_train.parallel.ffn_m.embedding import RowOrder


class Run(NamedTuple):
    """Elements [start, start + length) of a parameter are at `position` in a rank's flat tensor."""

    start: int
    length: int
    position: int


class Flat(NamedTuple):
    """A flat fp32 tensor of AdamW on this rank. Its moments are in the optimizer's state of `owner`."""

    tensor: Tensor
    owner: Tensor
    group: Any  # of the ranks that hold the other shards; None: this rank holds all
    members: dict[str, Callable[[int], Run]]  # parameter name -> function from rank of the group to its run
    order: RowOrder | None = None  # of its rows, where checkpoints have another one

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return 1 if self.group is None else dist.get_world_size(self.group)


def cut_anywhere(offset: int, numel: int, size: int) -> Callable[[int], Run]:
    """Runs of a parameter at `offset` of concatenated parameters that are cut into shards of `size`."""

    def run(rank: int) -> Run:
        low, high = max(rank * size, offset), min((rank + 1) * size, offset + numel)
        return Run(low - offset, max(high - low, 0), low - rank * size)

    return run


def cut_evenly(position: int, numel: int, size: int) -> Callable[[int], Run]:
    """Runs of a parameter that is itself cut into shards of `size`, the last one padded."""

    def run(rank: int) -> Run:
        start = min(rank * size, numel)
        return Run(start, min(size, numel - start), position)

    return run
