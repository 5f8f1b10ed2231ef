"""One optimizer step and one evaluation on this rank's micro-batches."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from signal import Signals as Signal
from typing import NamedTuple

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
from mlm_train.utils.host_copy import HostCopy


@dataclass(frozen=True)
class StepResult:
    """The result of a step, summed or averaged over all data-parallel ranks."""

    loss: float  # mean cross-entropy over valid labels, without z-loss
    grad_norm: float  # before clipping; infinite if the step was skipped
    tokens: int  # positions in the step
    distinct_micro: float  # distinct ids per token of a micro-batch
    distinct_step: float  # distinct ids per token of a rank's step
    ffn_m_evaluations: float  # per token, over all layers; without recomputation
    seconds: float  # wall time, including the wait for its data
    asked: Signal | None  # the signal that some rank received to end the run; equal on all ranks
    waited: list[float]  # seconds per rank, waiting for its data, without waiting for other ranks
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
        self.finished = 0.0  # when the latest step was over whose results were read (time.perf_counter)

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

    def step(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Train on this rank's micro-batches of one global batch, and wait for the results."""
        return self.launch(batches, lr).result()

    def launch(
        self, batches: Sequence[MicroBatch], lr: float, waited: float = 0.0, reading: float = 0.0
    ) -> "LaunchedStep":
        """The same, without waiting for a device.

        waited: seconds spent waiting for the micro-batches. reading: those that this rank took to read them.
        """
        started, marker = time.perf_counter() - waited, self.runtime.marker
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
        # Norms are equal on all ranks.
        sums = self._over_all(
            [total, *map(float, counts)],
            [*self.signals.heard(), mine, norm if self.runtime.is_rank_0 else 0.0],
            (min(waited, reading), marker.forwards.read(), float(peak_memory_bytes(self.runtime.device))),
        )
        return LaunchedStep(self, batches, labels, started, sums, self.engine.nonfinite())

    def fault(self, loss: float, batches: Sequence[MicroBatch], nonfinite: Sequence[str]) -> str:
        """Describe the non-finite value of a step, and its origin; `nonfinite`: of its gradients, by name."""
        self.runtime.marker.at("search for non-finite values")
        what = "non-finite gradient" if math.isfinite(loss) else f"loss {loss}"
        model = self.engine.model
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
    ) -> "Sums":
        """One all-reduce over all ranks, of three kinds of values.

        shared: equal on the ranks of a replica, summed once per replica. own: summed over all ranks. each:
        not summed; one value per rank. Tensors are scalars on the device.
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
        return Sums(HostCopy(self.runtime.sum_over_all(values)), len(shared), len(own), len(each))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks; values and result are on the CPU."""
        return self.runtime.sum_over_data(values)


class Sums(NamedTuple):
    """Values summed over all ranks (Trainer._over_all), on their way to the CPU; how many of each kind."""

    values: HostCopy
    shared: int
    own: int
    each: int

    def wait(self) -> tuple[list[float], list[float], list[list[float]]]:
        """The sums; of `each` a list over the ranks per value."""
        shared, own, table = self.values.wait().tensor_split((self.shared, self.shared + self.own))
        return shared.tolist(), own.tolist(), table.view(self.each, -1).tolist()


class LaunchedStep:
    """A step that a device may still be working on."""

    def __init__(
        self,
        trainer: Trainer,
        batches: Sequence[MicroBatch],
        labels: float,
        started: float,
        sums: Sums,
        nonfinite: Callable[[], list[str]],
    ) -> None:
        self.trainer, self.batches, self.labels, self.started = trainer, batches, labels, started
        self.sums, self.nonfinite = sums, nonfinite
        self.finished = time.perf_counter() if sums.values.has_arrived else None

    def result(self) -> StepResult:
        """Wait for the step and return its results. Every rank calls it, once for each step, in their order.

        Its seconds are those since the step before it was over, if that was after its own start. Raises
        UserError if the loss is non-finite although the weights have changed.
        """
        (loss, tokens, micro, distinct), (*heard, evaluations, grad_norm), each = self.sums.wait()
        waits, forwards, peaks = each
        finished = self.finished or time.perf_counter()
        seconds = finished - max(self.started, self.trainer.finished)
        self.trainer.finished = finished
        fault = None
        if not math.isfinite(grad_norm):
            fault = self.trainer.fault(loss, self.batches, self.nonfinite())
        elif not math.isfinite(loss):
            raise SharedUserError(
                f"the loss is {loss} although all gradients are finite, so the weights have changed: "
                "restart, to resume from the newest committed checkpoint"
            )
        return StepResult(
            loss=loss / max(self.labels, 1.0),
            grad_norm=grad_norm,
            tokens=int(tokens),
            distinct_micro=micro / tokens,
            distinct_step=distinct / tokens,
            ffn_m_evaluations=evaluations / tokens,
            seconds=seconds,
            asked=Signals.agreed(heard),
            waited=waits,
            forward=forwards,
            peak_memory=peaks,
            fault=fault,
        )
