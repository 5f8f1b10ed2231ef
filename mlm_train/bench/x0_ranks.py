"""The ranks of `bench x0`: run the same steps with each transport, first counted, then timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from mlm_train.bench import report
from mlm_train.bench.built import SEED, build, step_config
from mlm_train.bench.traffic import Traffic
from mlm_train.config import Config
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.model.loss import count_labels
from mlm_train.model.transformer import Transformer
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.pipeline.executor import PipelineExecutor
from mlm_train.parallel.pipeline.x0 import TRANSPORTS
from mlm_train.train.batches import MicroBatch, step_batches

# 2560 tokens per step: different from the vocabulary, so that no two formulas give the same number.
LAYERS, HIDDEN, VOCABULARY, LENGTH = 8, 128, 2048, 160
MICRO_BATCH, MICRO_BATCHES = 2, 8
VIRTUAL = 2  # stages per rank with interleaved_1f1b
COUNTED = 2  # steps counted before any is timed: the first one could move more than later ones

Step = Callable[[int], list[MicroBatch]]


def make_config(stages: int, schedule: str, vocabulary: int, transport: str | None) -> Config:
    """Config of the measured model; transport None: without FFN-M, whose stages need no x0."""
    parallel: dict[str, Any] = {"pipeline": stages, "pipeline_schedule": schedule}
    if schedule == "interleaved_1f1b":
        parallel["virtual_stages"] = VIRTUAL
    model = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 344,
    }
    if transport is not None:
        parallel["x0_transport"] = transport
    mode = None if transport is None else "unique"
    return step_config(model, mode, LENGTH, MICRO_BATCH, MICRO_BATCHES, {}, parallel)


@dataclass
class TimedTransport:
    """A model with one transport, and its latest mean cross-entropy."""

    model: Transformer
    executor: PipelineExecutor
    runtime: processes.Runtime
    loss: float = 0.0

    @classmethod
    def build(cls, config: Config) -> "TimedTransport":
        """Build on all ranks; every candidate has the same weights."""
        model, executor, runtime = build(config)
        assert isinstance(executor, PipelineExecutor)
        return cls(model, executor, runtime)

    def step(self, batches: list[MicroBatch]) -> float:
        """Run forward and backward of a step. Returns the seconds of the slowest rank."""
        self.model.zero_grad()
        labels = sum(count_labels(batch.labels) for batch in batches)
        self.runtime.barrier()
        started = time.perf_counter()
        total = self.executor.backward(batches, 1.0 / labels)
        seconds = time.perf_counter() - started
        self.loss = total.item() / labels
        return max(self.runtime.gather(lambda: seconds))

    def moved(self, batches: list[MicroBatch]) -> int:
        """Payload bytes that a step moves between ranks, summed over all."""
        self.model.zero_grad()
        labels = sum(count_labels(batch.labels) for batch in batches)
        with Traffic() as traffic:
            total = self.executor.backward(batches, 1.0 / labels)
        self.loss = total.item() / labels
        return sum(self.runtime.gather(lambda: traffic.bytes))


def work(order_file: str) -> int:
    """Run on a rank: measure as ordered; rank 0 writes the result beside `order_file`."""
    order = report.read_order(order_file)
    data = PreparedData.open(order["data"]) if order["data"] else None
    vocabulary = data.vocab_size if data is not None else VOCABULARY
    candidates = {
        name: TimedTransport.build(make_config(order["stages"], order["schedule"], vocabulary, name))
        for name in (None, *TRANSPORTS)
    }
    runtime = candidates[None].runtime
    result = _measure(candidates, _steps(data, runtime), order["runs"])
    if runtime.is_rank_0:
        report.write_result(order_file, result)
    runtime.barrier()
    processes.stop()
    return 0


def _measure(candidates: dict[str | None, TimedTransport], batches_of: Step, runs: int) -> dict[str, Any]:
    """Run the counted steps, then the timed ones, alternating over the transports."""
    measured: dict[str, Any] = {
        name: {"counted": [], "formula": [], "losses": [], "seconds": []} for name in TRANSPORTS
    }
    hidden, distinct, tokens = [], [], 0
    for step in range(COUNTED):
        batches = batches_of(step)
        ids = torch.cat([batch.ids for batch in batches])
        distinct.append(ids.unique().numel())
        tokens = ids.numel()
        hidden.append(candidates[None].moved(batches))
        for name, figures in measured.items():
            figures["counted"].append(candidates[name].moved(batches) - hidden[-1])
            channel = candidates[name].executor.channel
            figures["formula"].append(channel.bytes_per_step(distinct[-1], tokens))
            figures["losses"].append(candidates[name].loss)
    quiet = not candidates[None].runtime.is_rank_0
    console = Console(stderr=True)
    for run in track(range(runs), "timing", console=console, transient=True, disable=quiet):
        batches = batches_of(COUNTED + run)
        for name, figures in measured.items():
            figures["seconds"].append(candidates[name].step(batches))
    return {"transports": measured, "without_x0": hidden, "distinct": distinct, "tokens": tokens}


def _steps(data: PreparedData | None, runtime: processes.Runtime) -> Step:
    """Step number -> its micro-batches: prepared text, or ids drawn with probability proportional to 1/k."""
    size = MICRO_BATCH * MICRO_BATCHES
    if data is not None:
        samples = Samples(data.split("train"), LENGTH, SEED)
        return lambda step: step_batches(samples, step * size, size, MICRO_BATCH, runtime.topology)
    weights = 1.0 / torch.arange(1, VOCABULARY + 1)

    def drawn(step: int) -> list[MicroBatch]:
        generator = torch.Generator().manual_seed(SEED + step)
        ids = weights.multinomial(size * (LENGTH + 1), True, generator=generator).view(size, -1)
        pairs = zip(ids[:, :-1].split(MICRO_BATCH), ids[:, 1:].split(MICRO_BATCH), strict=True)
        return [MicroBatch(*pair) for pair in pairs]

    return drawn
