"""One optimizer step and one evaluation, on this rank's share of the batch."""

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
    """What a step did, summed or averaged over all data-parallel ranks."""

    loss: float  # mean cross-entropy over valid labels, z-loss left out
    grad_norm: float  # before clipping; infinite where the step was skipped
    tokens: int  # positions of the step
    distinct_micro: float  # distinct ids of a micro-batch / its tokens
    distinct_step: float  # distinct ids of a rank's step / its tokens
    ffn_m_evaluations: float  # of FFN-M, all layers together / tokens; what is computed again left out
    seconds: float
    asked: Signal | None  # what asks the run to end here, on some rank; the same on every one
    waited: list[float]  # seconds that each rank waited for its data
    forward: list[float]  # seconds of each rank's forward passes, waiting for other ranks left out
    peak_memory: list[float]  # bytes that each rank has used at most so far
    fault: str | None  # what was not finite, and where: the step has changed nothing then


class Trainer:
    """Runs micro-batches through model and engine, with one loss normalisation for all layouts."""

    def __init__(
        self, engine: Engine, executor: Executor, runtime: Runtime, signals: Signals | None = None
    ) -> None:
        self.engine, self.executor, self.runtime = engine, executor, runtime
        self.signals = signals or Signals()
        self.spoilt: list[str] = []  # parameters whose gradient here was not finite in the latest step

    def backward(self, batches: Sequence[MicroBatch]) -> tuple[Tensor, float]:
        """Accumulate gradients of DP/N * sum(CE + z * lse^2); this data-parallel rank's CE, and N.

        N counts the valid labels of the whole step over all ranks, so masks of any shape give one
        process's gradients; the factor DP undoes the engine's average over data parallel.
        """
        self.runtime.marker.at("count of labels")
        mine = sum(count_labels(batch.labels) for batch in batches)
        labels = self._sum_over_ranks(torch.tensor(float(mine), dtype=torch.float64)).item()
        with self.engine.accumulating():
            total = self.executor.backward(batches, self.runtime.topology.data / max(labels, 1.0))
            self.spoilt = self.engine.nonfinite()
            if not total.isfinite():
                self.engine.spoil()
        return total, labels

    def step(self, batches: Sequence[MicroBatch], lr: float, waited: float = 0.0) -> StepResult:
        """Train on this rank's micro-batches of one global batch, for which it waited so many seconds.

        Raises UserError where the loss was not finite, and yet the weights have changed.
        """
        started, marker = time.perf_counter(), self.runtime.marker
        marker.forwards.read()  # an evaluation's
        total, labels = self.backward(batches)
        marker.at("optimizer step")
        grad_norm = self.engine.step(lr)
        marker.at("metrics")
        micro = sum(batch.ids.unique().numel() for batch in batches)
        whole = torch.cat([batch.ids.flatten() for batch in batches])
        source = self.executor.source
        # Each stage evaluates its layers; the ranks that share a layer do so together.
        evaluates = source is not None and self.runtime.topology.tensor_rank == 0
        mine = source.evaluations(whole.numel(), micro) if source and evaluates else 0
        counts = (whole.numel(), micro, whole.unique().numel())
        (loss, tokens, micro, distinct), (*heard, evaluations), (waits, forwards, peaks) = self._over_all(
            [total.item(), *map(float, counts)],
            [*self.signals.heard(), mine],
            (waited, marker.forwards.read(), float(peak_memory_bytes(self.runtime.device))),
        )
        fault = None
        if not math.isfinite(grad_norm):
            fault = self._fault(loss, batches)
        elif not math.isfinite(loss):
            raise SharedUserError(
                f"the loss is {loss}, but no gradient, so the weights have changed: start again, from the "
                "newest of the committed checkpoints, which are kept"
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
        """What was not finite in the step, and where."""
        self.runtime.marker.at("search for what is not finite")
        what = "gradient not finite" if math.isfinite(loss) else f"loss {loss}"
        model = self.engine.model
        assert isinstance(model, Transformer)
        return f"{what}; {locate(model, lambda: self.executor.evaluate(batches), self.spoilt, self.runtime)}"

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean cross-entropy over the valid labels of all ranks' batches."""
        return self.evaluate_by_source(batches, [0] * len(batches), 1)[0]

    def evaluate_by_source(
        self, batches: Sequence[MicroBatch], sources: Sequence[int], number: int
    ) -> tuple[float, list[float]]:
        """The same, and the mean of each of `number` sources, NaN where it has no label.

        sources: the one of each micro-batch.
        """
        sums = torch.zeros(2, number, dtype=torch.float64)  # cross-entropy, labels
        labels = torch.tensor([count_labels(batch.labels) for batch in batches], dtype=torch.float64)
        found = torch.stack([self.executor.evaluate(batches).cpu(), labels])
        sums.index_add_(1, torch.tensor(sources), found)
        losses, counts = self._sum_over_ranks(sums)
        return float(losses.sum()) / max(float(counts.sum()), 1.0), (losses / counts).tolist()

    def _over_all(
        self, shared: Sequence[float], own: Sequence[float], each: Sequence[float]
    ) -> tuple[list[float], list[float], list[list[float]]]:
        """One sum over all ranks: of `shared`, which the ranks of a replica know alike, once a replica; of
        `own`, which each rank has itself; and every rank's value of each in `each`, unsummed.
        """
        topology = self.runtime.topology
        once = shared if topology.is_replica_rank_0 else [0.0] * len(shared)
        table = torch.zeros(len(each), topology.world, dtype=torch.float64)
        table[:, topology.rank] = torch.tensor(each, dtype=torch.float64)
        values = torch.cat([torch.tensor([*once, *own], dtype=torch.float64), table.flatten()])
        sizes = [len(shared), len(own), table.numel()]
        sums = self.runtime.sum_over_all(values.to(self.runtime.device)).cpu().split(sizes)
        return sums[0].tolist(), sums[1].tolist(), sums[2].view_as(table).tolist()

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sums over data parallel, on the CPU as the values are."""
        return self.runtime.sum_over_data(values.to(self.runtime.device)).cpu()
