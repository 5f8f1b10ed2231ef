"""Pipeline parallelism through torch.distributed.pipelining, with x0 at every stage.

A stage's shapes are given and never inferred (inference would run an extra forward and backward). The loss
is computed and scaled inside the last stage, with the gradients of the head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from mlm_train.config import Config
from mlm_train.memory import TableSource, TrainingSource
from mlm_train.model.loss import IGNORED
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.pipeline.marked_stage import MarkedStage
from mlm_train.parallel.pipeline.plans import Batch, Plans
from mlm_train.parallel.pipeline.single_stage import Loss
from mlm_train.parallel.pipeline.stages import StageSpan, my_spans
from mlm_train.parallel.pipeline.x0 import X0Channel
from mlm_train.parallel.runtime import Runtime
from mlm_train.parallel.tensor.collectives import TensorGroup
from mlm_train.parallel.tensor.layers import sum_replicated

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}


def sent_dtype(precision: torch.autocast) -> torch.dtype:
    """The dtype of the residual stream between stages."""
    return precision.fast_dtype if precision._enabled else torch.float32


class Stage(nn.Module):
    """A span of the model's layers as the module of a pipeline stage."""

    def __init__(
        self,
        model: Transformer,
        span: StageSpan,
        channel: X0Channel,
        source: TrainingSource | None,
        loss: Loss,
        precision: torch.autocast,
    ) -> None:
        super().__init__()
        self.part, self.span = model.part(span.layers, heads=span.last), span
        self.channel, self.source = channel, source
        self.loss, self.precision, self.sent_dtype = loss, precision, sent_dtype(precision)
        all_tabled = isinstance(source, TableSource) and source.other_layers is None
        self.needs_x0 = source is not None and not all_tabled  # FFN-M is computed from a micro-batch's x0
        self.scale = 1.0
        self.sums = torch.zeros(0, dtype=torch.float64)  # CE of each micro-batch, on the last stage
        if isinstance(source, TableSource):  # with these zero-bubble schedules run a lookup's backward
            anchors = (source.anchors.get(layer) for layer in span.layers)
            self.anchors = nn.ParameterList(anchor for anchor in anchors if anchor is not None)

    def forward(self, *received: Tensor, ids: Tensor, labels: Tensor, index: Tensor, number: Tensor) -> Any:
        """Forward of a micro-batch: hidden [, x0] for the next stage; the last stage returns the loss, [1].

        received: ids on the first stage, hidden [, x0] on others. ids, labels, index int64 [batch, sequence].
        number: int64 [batch], the micro-batch's number, repeated since torch splits all keywords alike.
        """

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return self.loss(hidden, weight, labels, self.scale)

        with self.precision:
            if self.span.first:
                x = x0 = self.channel.x0(ids, index)
            else:
                # In bf16 stages send that, but add up the residual stream in fp32.
                x, *rest = (tensor.float() for tensor in received)
                x0 = rest[0] if self.channel.relays else None  # type: ignore[assignment]
                if x0 is None and self.needs_x0:
                    x0 = self.channel.x0(ids, index)
            out = self.part(ids, self.source, loss=head, x0=x0, x=x)
        if not self.span.last:
            out = out.to(self.sent_dtype)
            return (out, x0.to(self.sent_dtype)) if self.channel.relays else out
        objective, cross_entropy = out
        self.sums.index_add_(0, number[:1], cross_entropy.double().view(1))
        return objective.view(1)


class PipelineExecutor:
    """The executor of this rank's pipeline stages."""

    def __init__(
        self,
        model: Transformer,
        config: Config,
        runtime: Runtime,
        tensor: TensorGroup,
        source: TrainingSource | None,
        channel: X0Channel,
        loss: Loss,
        precision: torch.autocast,
    ) -> None:
        self.model, self.config, self.runtime, self.tensor = model, config, runtime, tensor
        self.channel, self.source = channel, source
        self.spans = my_spans(config, runtime.topology)
        self.stages = [Stage(model, span, channel, source, loss, precision) for span in self.spans]
        self.schedules: dict[int, Any] = {}
        self.plans = Plans(channel, source)

    @property
    def roots(self) -> Sequence[nn.Module]:
        return self.stages

    def attach(self, entry: nn.Module, before_pass: Callable[[bool], None]) -> None:
        """Stages are called by torch's schedules, which tell FSDP the last pass themselves."""

    def plan_ahead(self, batches: Sequence[Batch]) -> None:
        if self.model.config.has_memory or self._first:
            self.plans.make(batches)

    def _schedule(self, micro_batches: int) -> Any:
        """The schedule for a number of micro-batches; batch size warmup needs several.

        Each holds receive buffers for all its micro-batches: only that of the full batch size is kept.
        """
        if micro_batches not in self.schedules:
            usual = self.runtime.topology.micro_batches(self.config.train)
            self.schedules = {count: schedule for count, schedule in self.schedules.items() if count == usual}
            kind = SCHEDULES[self.config.parallel.order]
            stages = [self._pipeline_stage(stage) for stage in self.stages]
            self.schedules[micro_batches] = kind(
                stages if len(stages) > 1 else stages[0],
                micro_batches,
                loss_fn=lambda out, _: out.sum(),
                scale_grads=False,
            )
        return self.schedules[micro_batches]

    def _pipeline_stage(self, stage: Stage) -> MarkedStage:
        config = self.config
        batch, length = config.train.micro_batch_size, config.data.sequence_length
        ids = torch.zeros(batch, length, dtype=torch.int64, device=self.runtime.device)
        here = (batch, length // self.tensor.shards, config.model.hidden_size)
        hidden = torch.empty(here, dtype=stage.sent_dtype, device=self.runtime.device)
        carried = tuple(
            torch.empty_like(hidden).requires_grad_() for _ in range(2 if self.channel.relays else 1)
        )
        return MarkedStage(
            self.runtime.marker,
            stage,
            stage.span.number,
            config.parallel.stages,
            self.runtime.device,
            input_args=(ids,) if stage.span.first else carried,
            output_args=(torch.empty(1, device=ids.device).requires_grad_(),) if stage.span.last else carried,
            group=self.runtime.groups.pipeline,
        )

    def _run(self, batches: Sequence[Batch], training: bool, scale: float) -> Tensor:
        """Run the schedule; each micro-batch's summed CE, fp64 [micro-batches], on every pipeline rank."""
        self.runtime.marker.at("x0")
        device = self.runtime.device
        ids, labels = (torch.cat(parts).to(device, non_blocking=True) for parts in zip(*batches, strict=True))
        index = ids
        if self.model.config.has_memory or self._first:
            index = self.plans.begin(batches, ids)
        sums = torch.zeros(len(batches), dtype=torch.float64, device=device)
        for stage in self.stages:
            stage.train(training)
            stage.scale, stage.sums = scale, sums
        schedule = self._schedule(len(batches))
        call = schedule.step if training else schedule.eval
        number = torch.arange(len(batches), device=device).repeat_interleave(len(ids) // len(batches))
        arguments = {"ids": ids, "labels": labels, "index": index, "number": number, "return_outputs": False}
        if self._last:
            arguments |= {"target": labels, "losses": []}
        call(*((ids,) if self._first else ()), **arguments)
        self.runtime.marker.at("loss")
        dist.all_reduce(sums, group=self.runtime.groups.pipeline)
        return sums

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Run the schedule, then finish the gradients of the embedding, the tied head and the norms."""
        total = self._run(batches, True, scale).sum()
        self.runtime.marker.at("gradient of x0")
        self.channel.finish()
        self._sum_tied()
        sum_replicated(self.model, self.tensor)
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Run the same stages forward, with as many micro-batches at a time as in training."""
        usual = self.runtime.topology.micro_batches(self.config.train)
        ids, labels = batches[0]
        empty = (torch.zeros_like(ids), torch.full_like(labels, IGNORED))
        sums = []
        for start in range(0, len(batches), usual):
            chunk = list(batches[start : start + usual])
            sums.append(self._run(chunk + [empty] * (usual - len(chunk)), False, 1.0)[: len(chunk)])
        return torch.cat(sums)

    @property
    def _first(self) -> bool:
        return self.spans[0].first

    @property
    def _last(self) -> bool:
        return self.spans[-1].last

    def _sum_tied(self) -> None:
        """Sum the gradients of the embedding and of its copy on the last stage, the tied head."""
        tied = self.model.config.tie_word_embeddings and (self._first or self._last)
        if not tied or (self._first and self._last) or self.config.transport == "replicate":
            return  # one weight on one rank (V-shaped schedules), or summed over all stages already
        assert self.model.embed_tokens is not None
        weight = self.model.embed_tokens.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        dist.all_reduce(weight.grad, group=self.runtime.groups.embedding)
