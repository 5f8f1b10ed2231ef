"""One optimizer step and one evaluation, on this rank's share of the batch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_train.memory import Table
from mlm_train.model.loss import count_labels
from mlm_train.parallel.engine import Engine
from mlm_train.parallel.execution import Executor
from mlm_train.parallel.runtime import Runtime
from mlm_train.train.batches import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """What a step did, summed or averaged over all data-parallel ranks."""

    loss: float  # mean cross-entropy over valid labels, z-loss left out
    grad_norm: float  # before clipping
    tokens: int  # positions of the step
    distinct_micro: float  # distinct ids of a micro-batch / its tokens
    distinct_step: float  # distinct ids of a rank's step / its tokens
    table_rows: float  # rows of FFN-M's tables that were computed, a layer / tokens
    seconds: float


class Trainer:
    """Runs micro-batches through model and engine, with one loss normalisation for all layouts."""

    def __init__(self, engine: Engine, executor: Executor, runtime: Runtime) -> None:
        self.engine, self.executor, self.runtime = engine, executor, runtime

    def backward(self, batches: Sequence[MicroBatch]) -> tuple[Tensor, float]:
        """Accumulate gradients of DP/N * sum(CE + z * lse^2); this data-parallel rank's CE, and N.

        N counts the valid labels of the whole step over all ranks, so masks of any shape give one
        process's gradients; the factor DP undoes the engine's average over data parallel.
        """
        self.runtime.place.at("count of labels")
        labels = self._everywhere([float(sum(count_labels(batch.labels) for batch in batches))])[0]
        with self.engine.accumulating():
            total = self.executor.backward(batches, self.runtime.topology.data / max(labels, 1.0))
        return total, labels

    def step(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Train on this rank's micro-batches of one global batch."""
        started = time.perf_counter()
        total, labels = self.backward(batches)
        self.runtime.place.at("optimizer step")
        grad_norm = self.engine.step(lr)
        self.runtime.place.at("metrics")
        micro = sum(batch.ids.unique().numel() for batch in batches)
        whole = torch.cat([batch.ids.flatten() for batch in batches])
        source = self.executor.source
        computed = len(source.rows) if isinstance(source, Table) else 0
        counts = (whole.numel(), micro, whole.unique().numel(), computed)
        loss, tokens, micro, distinct, rows = self._everywhere([total.item(), *map(float, counts)])
        return StepResult(
            loss=loss / max(labels, 1.0),
            grad_norm=grad_norm,
            tokens=int(tokens),
            distinct_micro=micro / tokens,
            distinct_step=distinct / tokens,
            table_rows=rows / tokens,
            seconds=time.perf_counter() - started,
        )

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean cross-entropy over the valid labels of all ranks' batches."""
        total = self.executor.evaluate(batches)
        labels = sum(count_labels(batch.labels) for batch in batches)
        loss, count = self._everywhere([total.item(), float(labels)])
        return loss / max(count, 1.0)

    def _everywhere(self, values: Sequence[float]) -> list[float]:
        """Sums over data parallel."""
        device = self.runtime.device
        return self.runtime.sum_over_data(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
