"""Plans of steps: made ahead by the data thread, or when a step needs one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm_train.memory import TableSource, TrainingSource, UniqueSource
from mlm_train.memory.unique import DistinctIds
from mlm_train.parallel.pipeline.x0 import X0Channel

Batch = tuple[Tensor, Tensor]  # ids and labels on the CPU, int64 [batch, sequence]
KEPT = 2  # of this step and the next; a step that is dropped is never asked for


class StepPlan(NamedTuple):
    """What the channel plans for a step, and the distinct ids of its micro-batches where they are needed."""

    rows: Any
    distinct: list[DistinctIds]


class Plans:
    """The plans of steps, by the identity of the list of a step's micro-batches."""

    def __init__(self, channel: X0Channel, source: TrainingSource | None) -> None:
        self.channel = channel
        others = source.other_layers if isinstance(source, TableSource) else source
        self.unique = others if isinstance(others, UniqueSource) else None
        self.made: dict[int, tuple[Sequence[Batch], StepPlan]] = {}

    def make(self, batches: Sequence[Batch]) -> None:
        """Plan a later step. Every rank's data thread calls it, for the same steps in the same order."""
        plan = self._plan(batches, ahead=True)
        while len(self.made) >= KEPT:
            del self.made[next(iter(self.made))]
        self.made[id(batches)] = batches, plan

    def begin(self, batches: Sequence[Batch], ids: Tensor) -> Tensor:
        """Begin the step of these micro-batches; the channel's index. ids: theirs on the device, in one."""
        made = self.made.pop(id(batches), None)
        plan = self._plan(batches, ahead=False) if made is None else made[1]
        if self.unique is not None:
            self.unique.begin(ids, plan.distinct)
        return self.channel.begin(plan.rows)

    def _plan(self, batches: Sequence[Batch], ahead: bool) -> StepPlan:
        ids = [ids for ids, _ in batches]
        rows = self.channel.plan(torch.cat(ids), len(batches), ahead)
        return StepPlan(rows, [] if self.unique is None else list(map(DistinctIds.of, ids)))
