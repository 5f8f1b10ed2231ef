"""Run a step's micro-batches on one pipeline stage: forward and backward, or forward in evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mlm_train.config import Config
from mlm_train.memory import TrainingSource
from mlm_train.parallel.pipeline.plans import Batch, Plans
from mlm_train.parallel.pipeline.x0 import X0Channel
from mlm_train.parallel.runtime import Runtime

# (hidden, normed [..., hidden]; head weight [local vocabulary, hidden]; labels [...]; scale) -> scalars:
# the objective scale * sum(CE + z * lse^2), the root of a backward pass, and the sum of CE, detached.
Loss = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class Executor(Protocol):
    """Runs micro-batches through the model in any pipeline layout."""

    @property
    def source(self) -> TrainingSource | None:
        """The memory source that executes FFN-M; None where the model has none."""
        ...

    @property
    def roots(self) -> Sequence[nn.Module]:
        """The modules that a step calls, one per stage of the pipeline on this rank."""
        ...

    def attach(self, entry: nn.Module, before_pass: Callable[[bool], None]) -> None:
        """Take what an engine wants called: see Engine."""
        ...

    def plan_ahead(self, batches: Sequence[Batch]) -> None:
        """In the data thread: plan a later step, whose `backward` gets the same list."""
        ...

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Accumulate the gradients of scale * sum(CE + z * lse^2); return the summed CE, fp64 scalar."""
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The summed CE of each micro-batch, without gradients: fp64 [micro-batches]."""
        ...


class Prepared(NamedTuple):
    """A micro-batch of a step, on the device; `rows`: indices of its positions into the rows of x0."""

    number: int
    last: bool  # of the step
    ids: Tensor
    labels: Tensor
    rows: Tensor


class SingleStageExecutor:
    """All layers on this rank: one micro-batch after the other.

    `model`: the Transformer; `channel`: where x0 comes from, None for the model's embedding at each call.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        model: nn.Module,
        source: TrainingSource | None,
        channel: X0Channel | None,
        loss: Loss,
        precision: torch.autocast,
        after_backward: Callable[[], None],
    ) -> None:
        self.entry, self.source, self.channel = model, source, channel
        self.plans = None if channel is None else Plans(channel, source)
        self.before_pass: Callable[[bool], None] = _nothing
        self.loss, self.after_backward = loss, after_backward
        self.precision, self.device, self.marker = precision, runtime.device, runtime.marker
        self.gathers = config.parallel.zero == 3
        self.usual = runtime.topology.micro_batches(config.train)

    @property
    def roots(self) -> Sequence[nn.Module]:
        return [self.entry]

    def attach(self, entry: nn.Module, before_pass: Callable[[bool], None]) -> None:
        self.entry, self.before_pass = entry, before_pass

    def plan_ahead(self, batches: Sequence[Batch]) -> None:
        if self.plans is not None:
            self.plans.make(batches)

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Run one micro-batch after the other; gradients accumulate in fp32."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.step(batches) as micro_batches:
            for micro_batch in micro_batches:
                total += self.run(micro_batch, scale)
        return total

    @contextmanager
    def step(self, batches: Sequence[Batch]) -> Iterator[list[Prepared]]:
        """Surround a step's passes: compute the rows of x0 before them, finish gradients after them."""
        self.entry.train()
        micro_batches = self._prepared(batches)
        with self._casts_kept():
            yield micro_batches
            if self.channel is not None:
                self.marker.at("gradient of x0")
                self.channel.finish()
        self.after_backward()

    def run(self, micro_batch: Prepared, scale: float) -> Tensor:
        """Run forward and backward of a micro-batch of the step; return its summed CE."""
        self.marker.at("forward", None, micro_batch.number)
        self.before_pass(micro_batch.last)
        with self.marker.forwards.running():
            objective, cross_entropy = self._loss(micro_batch, scale)
        self.marker.at("backward", None, micro_batch.number)
        objective.backward()
        return cross_entropy

    def _casts_kept(self) -> AbstractContextManager[object]:
        """A region in which autocast casts a weight once, not once per micro-batch.

        Autocast drops its cached casts where the outermost region ends; this one is disabled and surrounds
        those of the micro-batches. Tables are computed before it: a cast made without a graph would be cached
        without one. The optimizer, which changes the weights, runs after it. Not with ZeRO-3, which frees a
        weight after its use: the backward of a cached cast would need it.
        """
        return nullcontext() if self.gathers else torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Forward only; as many micro-batches as in a training step share the rows of x0."""
        self.entry.eval()
        sums = []
        for start in range(0, len(batches), self.usual):
            for micro_batch in self._prepared(batches[start : start + self.usual]):
                self.marker.at("forward", None, micro_batch.number)
                sums.append(self._loss(micro_batch, 1.0)[1].double())
        return torch.stack(sums)

    def _prepared(self, batches: Sequence[Batch]) -> list[Prepared]:
        """The micro-batches on the device; they share the rows of x0."""
        ids, labels = (
            torch.cat(parts).to(self.device, non_blocking=True) for parts in zip(*batches, strict=True)
        )
        index = ids
        if self.plans is not None:
            self.marker.at("x0")
            index = self.plans.begin(batches, ids)
        sizes, last = [len(batch) for batch, _ in batches], len(batches) - 1
        parts = enumerate(zip(*(part.split(sizes) for part in (ids, labels, index)), strict=True))
        return [Prepared(number, number == last, *part) for number, part in parts]

    def _loss(self, micro_batch: Prepared, scale: float) -> tuple[Tensor, Tensor]:
        """Objective and summed CE. The head is applied inside the model's forward, as all its weights are."""
        _, _, ids, labels, rows = micro_batch

        def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return self.loss(hidden, weight, labels, scale)

        with self.precision:
            x0 = self.channel.x0(ids, rows) if self.channel is not None else None
            return self.entry(ids, self.source, loss=loss, x0=x0)


def _nothing(_: bool) -> None:
    """Before a pass of an engine that wants nothing done."""
