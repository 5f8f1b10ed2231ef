"""One optimizer step and one evaluation on this rank's micro-batches."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from signal import Signals as Signal

import torch
from torch import Tensor

from mlm_train.errors import SharedUserError
from mlm_train.model.loss import count_labels
from mlm_train.model.transformer import Transformer
from mlm_train.monitor.resources import peak_memory_bytes
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.pipeline.single_stage import Executor
from mlm_train.parallel.runtime import Runtime
from mlm_train.train.batches import MicroBatch
from mlm_train.train.faults import locate
from mlm_train.train.signals import Signals


@dataclass(frozen=True)
class StepResult:
    """The result of a step, summed or averaged over all data-parallel ranks."""

    loss: float  # mean cross-entropy over valid labels, without z-loss
    grad_norm: float  # before clipping; infinite if the step was skipped
    tokens: int  # positions in the step
    distinct_micro: float  # distinct ids per token of a micro-batch
    distinct_step: float  # distinct ids per token of a rank's step
    ffn_m_evaluations: float  # per token, over all layers; without recomputation
    seconds: float
    asked: Signal | None  # the signal that some rank received to end the run; equal on all ranks
    waited: list[float]  # seconds per rank, waiting for data
    forward: list[float]  # seconds per rank in forward passes, without waiting for other ranks
    peak_memory: list[float]  # bytes per rank so far
    fault: str | None  # the non-finite value and its origin, if the step was skipped


class Trainer:
    """Runs micro-batches through model and engine, with one loss normalisation for all layouts."""

    def __init__(
        self, engine: Engine, executor: Executor, runtime: Runtime, signals: Signals | None = None
    ) -> None:
        self.engine, self.executor, self.runtime = engine, executor, runtime
        self.signals = signals or Signals()

    def backward(self, batches: Sequence[MicroBatch]) -> tuple[Tensor, float]:
        """Accumulate gradients of DP/N * sum(CE + z * lse^2); return this rank's sum of CE, and N.

        N is the number of valid labels of the step over all ranks, so that gradients equal those of one
        process for any mask; the factor DP undoes the engine's average over data parallel.
        """
        self.runtime.marker.at("count of labels")
        mine = sum(count_labels(batch.labels) for batch in batches)
        labels = float(self._sum_over_ranks(torch.tensor(float(mine), dtype=torch.float64)))
        with self.engine.accumulating():
            total = self.executor.backward(batches, self.runtime.topology.data / max(labels, 1.0))
            self.engine.inspect(total)
        return total, labels

    def step(self, batches: Sequence[MicroBatch], lr: float, waited: float = 0.0) -> StepResult:
        """Train on this rank's micro-batches of one global batch.

        waited: seconds spent waiting for them. Raises UserError if the loss is non-finite although the
        weights have changed.
        """
        started, marker = time.perf_counter(), self.runtime.marker
        marker.forwards.read()  # discard an evaluation's seconds
        total, labels = self.backward(batches)
        marker.at("optimizer step")
        norm = self.engine.step(lr)
        marker.at("metrics")
        micro = sum(batch.ids.unique().numel() for batch in batches)
        whole = torch.cat([batch.ids.flatten() for batch in batches])
        source = self.executor.source
        # Each stage counts its own layers; tensor-parallel ranks share an evaluation of layers not owned.
        sliced = getattr(source, "tensor_sliced", True)
        evaluates = source is not None and (self.runtime.topology.tensor_rank == 0 or not sliced)
        mine = source.evaluations(whole.numel(), micro) if source and evaluates else 0
        counts = (whole.numel(), micro, whole.unique().numel())
        # Norms are equal on all ranks. This is the step's one wait for the device.
        (loss, tokens, micro, distinct), (*heard, evaluations, grad_norm), each = self._over_all(
            [total, *map(float, counts)],
            [*self.signals.heard(), mine, norm if self.runtime.is_rank_0 else 0.0],
            (waited, marker.forwards.read(), float(peak_memory_bytes(self.runtime.device))),
        )
        waits, forwards, peaks = each
        fault = None
        if not math.isfinite(grad_norm):
            fault = self._fault(loss, batches)
        elif not math.isfinite(loss):
            raise SharedUserError(
                f"the loss is {loss} although all gradients are finite, so the weights have changed: "
                "restart, to resume from the newest committed checkpoint"
            )
        return StepResult(
            loss=loss / max(labels, 1.0),
            grad_norm=grad_norm,
            tokens=int(tokens),
            distinct_micro=micro / tokens,
            distinct_step=distinct / tokens,
            ffn_m_evaluations=evaluations / tokens,
            seconds=time.perf_counter() - started,
            asked=Signals.agreed(heard),
            waited=waits,
            forward=forwards,
            peak_memory=peaks,
            fault=fault,
        )

    def _fault(self, loss: float, batches: Sequence[MicroBatch]) -> str:
        """Describe the non-finite value of the step, and its origin."""
        self.runtime.marker.at("search for non-finite values")
        what = "non-finite gradient" if math.isfinite(loss) else f"loss {loss}"
        model, nonfinite = self.engine.model, self.engine.nonfinite()
        assert isinstance(model, Transformer)
        return f"{what}; {locate(model, lambda: self.executor.evaluate(batches), nonfinite, self.runtime)}"

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean cross-entropy over the valid labels of all ranks' batches."""
        return self.evaluate_by_source(batches, [0] * len(batches), 1)[0]

    def evaluate_by_source(
        self, batches: Sequence[MicroBatch], sources: Sequence[int], number: int
    ) -> tuple[float, list[float]]:
        """The same, and the mean of each of `number` sources (NaN without labels).

        sources: the source index of each micro-batch.
        """
        sums = torch.zeros(2, number, dtype=torch.float64)  # cross-entropy, labels
        labels = torch.tensor([count_labels(batch.labels) for batch in batches], dtype=torch.float64)
        per_batch = torch.stack([self.executor.evaluate(batches).cpu(), labels])
        sums.index_add_(1, torch.tensor(sources), per_batch)
        losses, counts = self._sum_over_ranks(sums)
        return float(losses.sum()) / max(float(counts.sum()), 1.0), (losses / counts).tolist()

    def _over_all(
        self, shared: Sequence[float | Tensor], own: Sequence[float | Tensor], each: Sequence[float]
    ) -> tuple[list[float], list[float], list[list[float]]]:
        """One all-reduce over all ranks, of three kinds of values.

        shared: equal on the ranks of a replica, summed once per replica. own: summed over all ranks. each:
        not summed; returned as one list over the ranks per value. Tensors are scalars on the device.
        """
        topology = self.runtime.topology
        once = shared if topology.is_replica_rank_0 else [0.0] * len(shared)
        table = torch.zeros(len(each), topology.world, dtype=torch.float64)
        table[:, topology.rank] = torch.tensor(each, dtype=torch.float64)
        summed = [*once, *own]
        known = [0.0 if isinstance(value, Tensor) else value for value in summed]
        values = torch.cat([torch.tensor(known, dtype=torch.float64), table.flatten()])
        values = values.to(self.runtime.device, non_blocking=True)
        for position, value in enumerate(summed):
            if isinstance(value, Tensor):
                values[position] = value
        sizes = [len(shared), len(own), table.numel()]
        sums = self.runtime.sum_over_all(values).cpu().split(sizes)
        return sums[0].tolist(), sums[1].tolist(), sums[2].view_as(table).tolist()

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks; values and result are on the CPU."""
        return self.runtime.sum_over_data(values)
