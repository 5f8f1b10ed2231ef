"""Running a step's micro-batches: forward and backward on one rank, or the evaluation's forward."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mlm_train.memory import Table
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.mappings import TensorGroup
from mlm_train.parallel.place import Place

# (hidden, normed [..., hidden]; head weight [words here, hidden]; labels [...]; scale) -> scalars:
# the objective scale * sum(CE + z * lse^2), to be the root of a backward pass, and the sum of CE, detached.
Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Batch = tuple[Tensor, Tensor]  # ids and labels, int64 [batch, sequence]


class Executor(Protocol):
    """Runs micro-batches through the model, however its layers are spread."""

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Add the gradients of scale * sum(CE + z * lse^2); the summed CE, fp64 scalar."""
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The summed CE without gradients, fp64 scalar."""
        ...


class Sequential:
    """All layers on this rank: one micro-batch after the other. `model`: the Transformer, or its entry."""

    def __init__(
        self,
        model: Transformer,
        entry: nn.Module,
        tensor: TensorGroup,
        source: MemorySource | None,
        loss: Loss,
        precision: torch.autocast,
        device: torch.device,
        place: Place,
        after_backward: Callable[[], None],
    ) -> None:
        self.model, self.entry, self.tensor, self.source = model, entry, tensor, source
        self.loss, self.after_backward = loss, after_backward
        self.precision, self.device, self.place = precision, device, place

    def _loss(self, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        """Objective and summed CE. The head is used inside the model's forward, as all its weights are."""
        ids, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with self.precision:
            return self.entry(
                ids, self.source, loss=lambda hidden, weight: self.loss(hidden, weight, labels, scale)
            )

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """One after the other; gradients accumulate in fp32."""
        rows = self.begin(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            total += self.run(number, batch, scale)
        self.finish(rows)
        return total

    # The three parts of `backward`, which `bench train` times one by one.

    def begin(self, batches: Sequence[Batch]) -> Tensor | None:
        """What comes before a step's micro-batches: the tables' rows [distinct, hidden], or None."""
        self.entry.train()
        return self._begin(batches)

    def run(self, number: int, batch: Batch, scale: float) -> Tensor:
        """Forward and backward of a micro-batch; its summed CE."""
        self.place.at("forward", None, number)
        objective, cross_entropy = self._loss(batch, scale)
        self.place.at("backward", None, number)
        objective.backward()
        return cross_entropy

    def finish(self, rows: Tensor | None) -> None:
        """What comes after them, with what `begin` gave."""
        if isinstance(self.source, Table) and rows is not None:
            self.place.at("backward of FFN-M's tables")
            gradient = self.source.finish()
            rows.backward(self.tensor.all_reduce(gradient) if self.tensor.positions > 1 else gradient)
        self.after_backward()

    def _begin(self, batches: Sequence[Batch]) -> Tensor | None:
        """Tables of the step's rows; these, with their graph to the embedding."""
        if not isinstance(self.source, Table):
            return None
        distinct = torch.cat([ids.flatten() for ids, _ in batches]).unique().to(self.device)
        rows = self.model.rows(distinct)
        self.source.begin(distinct, rows)
        return rows

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Forward alone."""
        self.entry.eval()
        self._begin(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.place.at("forward", None, number)
            total += self._loss(batch, 1.0)[1]
        return total
