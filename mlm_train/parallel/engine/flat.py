"""The flat tensors that hold AdamW's fp32 weights and moments, and where parameters lie in them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Run(NamedTuple):
    """Elements [start, start + length) of a parameter lie at `place` of a rank's flat tensor."""

    start: int
    length: int
    place: int


class Flat(NamedTuple):
    """One of AdamW's flat fp32 tensors on this rank. Its moments are the optimizer's state of `owner`."""

    tensor: Tensor
    owner: Tensor
    group: Any  # the ranks that hold the other parts; None: this one holds all
    members: dict[str, Callable[[int], Run]]  # parameter name -> a rank of the group -> its run

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return 1 if self.group is None else dist.get_world_size(self.group)


def cut_anywhere(offset: int, numel: int, share: int) -> Callable[[int], Run]:
    """Parameters in a row, the row cut into shares."""

    def run(rank: int) -> Run:
        low, high = max(rank * share, offset), min((rank + 1) * share, offset + numel)
        return Run(low - offset, max(high - low, 0), low - rank * share)

    return run


def cut_evenly(place: int, numel: int, part: int) -> Callable[[int], Run]:
    """Each parameter cut into parts, the last one padded; or one part."""

    def run(rank: int) -> Run:
        start = min(rank * part, numel)
        return Run(start, min(part, numel - start), place)

    return run
