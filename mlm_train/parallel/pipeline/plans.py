"""Plans of steps: made ahead by the data thread, or when a step needs one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlm_train.parallel.pipeline.x0 import X0Channel

Batch = tuple[Tensor, Tensor]  # ids and labels on the CPU, int64 [batch, sequence]
KEPT = 2  # of this step and the next; a step that is dropped is never asked for


class Plans:
    """What a channel plans for a step's micro-batches, by the identity of their list."""

    def __init__(self, channel: X0Channel) -> None:
        self.channel = channel
        self.made: dict[int, tuple[Sequence[Batch], Any]] = {}

    def make(self, batches: Sequence[Batch]) -> None:
        """Plan a later step. Every rank's data thread calls it, for the same steps in the same order."""
        plan = self._plan(batches, ahead=True)
        while len(self.made) >= KEPT:
            del self.made[next(iter(self.made))]
        self.made[id(batches)] = batches, plan

    def take(self, batches: Sequence[Batch]) -> Any:
        """The plan of these micro-batches."""
        if (made := self.made.pop(id(batches), None)) is not None:
            return made[1]
        return self._plan(batches, ahead=False)

    def _plan(self, batches: Sequence[Batch], ahead: bool) -> Any:
        return self.channel.plan(torch.cat([ids for ids, _ in batches]), len(batches), ahead)
