"""Running a step's micro-batches: forward and backward on one rank, or the evaluation's forward."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mlm_train.model.loss import LossSums
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.place import Place

Loss = Callable[[Tensor, Tensor], LossSums]
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
    """All layers on this rank: one micro-batch after the other."""

    def __init__(
        self,
        model: Transformer,
        source: MemorySource | None,
        loss: Loss,
        precision: torch.autocast,
        z_loss: float,
        device: torch.device,
        place: Place,
    ) -> None:
        self.model, self.source, self.loss = model, source, loss
        self.precision, self.z_loss, self.device, self.place = precision, z_loss, device, place

    def _sums(self, batch: Batch) -> LossSums:
        ids, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with self.precision:
            logits = self.model(ids, self.source)
        return self.loss(logits, labels)

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """One after the other; gradients accumulate in fp32."""
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.place.at("forward", None, number)
            sums = self._sums(batch)
            self.place.at("backward", None, number)
            ((sums.cross_entropy + self.z_loss * sums.z) * scale).backward()
            total += sums.cross_entropy.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Forward alone."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.place.at("forward", None, number)
            total += self._sums(batch).cross_entropy
        return total
