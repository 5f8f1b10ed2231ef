"""Running a step's micro-batches: forward and backward on one rank, or the evaluation's forward."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mlm_train.config import Config
from mlm_train.memory import Table
from mlm_train.model.source import MemorySource
from mlm_train.parallel.runtime import Runtime
from mlm_train.parallel.x0 import X0Channel

# (hidden, normed [..., hidden]; head weight [words here, hidden]; labels [...]; scale) -> scalars:
# the objective scale * sum(CE + z * lse^2), to be the root of a backward pass, and the sum of CE, detached.
Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Batch = tuple[Tensor, Tensor]  # ids and labels, int64 [batch, sequence]


class Executor(Protocol):
    """Runs micro-batches through the model, however its layers are spread."""

    @property
    def table_rows(self) -> int:
        """Rows of FFN-M's tables that this rank computed for the last step; 0 without tables."""
        ...

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Add the gradients of scale * sum(CE + z * lse^2); the summed CE, fp64 scalar."""
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The summed CE without gradients, fp64 scalar."""
        ...


def rows_of(source: MemorySource | None) -> int:
    """Executor.table_rows of a source."""
    return len(source.rows) if isinstance(source, Table) else 0


class Sequential:
    """All layers on this rank: one micro-batch after the other.

    `entry`: the Transformer, or what is called in its place; `channel`: where x0 comes from, if not from
    the model's embedding at each call.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        entry: nn.Module,
        source: MemorySource | None,
        channel: X0Channel | None,
        loss: Loss,
        precision: torch.autocast,
        after_backward: Callable[[], None],
    ) -> None:
        self.entry, self.source, self.channel = entry, source, channel
        self.loss, self.after_backward = loss, after_backward
        self.precision, self.device, self.place = precision, runtime.device, runtime.place
        self.usual = runtime.topology.micro_batches(config.train)

    @property
    def table_rows(self) -> int:
        """Rows of the last step's tables."""
        return rows_of(self.source)

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """One after the other; gradients accumulate in fp32."""
        self.entry.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        micro_batches = self._prepared(batches)
        with self._casts_kept():
            for number, micro_batch in enumerate(micro_batches):
                self.place.at("forward", None, number)
                objective, cross_entropy = self._loss(*micro_batch, scale)
                self.place.at("backward", None, number)
                objective.backward()
                total += cross_entropy
            if self.channel is not None:
                self.place.at("gradient of x0")
                self.channel.finish()
        self.after_backward()
        return total

    def _casts_kept(self) -> torch.autocast:
        """A region in which autocast casts a weight once, not once a micro-batch.

        It forgets its casts where the outermost region ends; this one is switched off and surrounds those
        of the micro-batches. Tables are begun outside: a cast made without a graph would be kept without
        one. The optimizer, which changes the weights, runs after it.
        """
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Forward alone; as many micro-batches as in training share the rows of x0."""
        self.entry.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(batches), self.usual):
            for number, micro_batch in enumerate(self._prepared(batches[start : start + self.usual])):
                self.place.at("forward", None, number)
                total += self._loss(*micro_batch, 1.0)[1]
        return total

    def _prepared(self, batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """ids, labels and x0's index of each micro-batch, on the device. They share the rows of x0."""
        ids, labels = (
            [part.to(self.device, non_blocking=True) for part in parts]
            for parts in zip(*batches, strict=True)
        )
        index = ids
        if self.channel is not None:
            self.place.at("x0")
            index = list(self.channel.begin(torch.cat(ids)).split([len(some) for some in ids]))
        return list(zip(ids, labels, index, strict=True))

    def _loss(self, ids: Tensor, labels: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Objective and summed CE. The head is used inside the model's forward, as all its weights are."""

        def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return self.loss(hidden, weight, labels, scale)

        with self.precision:
            x0 = self.channel.x0(ids, index) if self.channel is not None else None
            return self.entry(ids, self.source, loss=loss, x0=x0)
