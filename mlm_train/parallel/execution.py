"""Running a step's micro-batches: forward and backward on one rank, or the evaluation's forward."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mlm_train.model.source import MemorySource
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
        model: nn.Module,
        source: MemorySource | None,
        loss: Loss,
        precision: torch.autocast,
        device: torch.device,
        place: Place,
        after_backward: Callable[[], None],
    ) -> None:
        self.model, self.source, self.loss, self.after_backward = model, source, loss, after_backward
        self.precision, self.device, self.place = precision, device, place

    def _loss(self, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        """Objective and summed CE. The head is used inside the model's forward, as all its weights are."""
        ids, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with self.precision:
            return self.model(
                ids, self.source, loss=lambda hidden, weight: self.loss(hidden, weight, labels, scale)
            )

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """One after the other; gradients accumulate in fp32."""
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.place.at("forward", None, number)
            objective, cross_entropy = self._loss(batch, scale)
            self.place.at("backward", None, number)
            objective.backward()
            total += cross_entropy
        self.after_backward()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Forward alone."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.place.at("forward", None, number)
            total += self._loss(batch, 1.0)[1]
        return total
