"""One example of each kind of part that users can add to mlm_train; docs/extending.md shows them."""

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.memory import SourceOptions
from mlm_train.memory.rows import Lookup
from mlm_train.model.block import MemoryBlock
from mlm_train.model.source import MemoryReader
from mlm_train.monitor.callback import Callback, Context
from mlm_train.monitor.report import StepReport
from mlm_train.monitor.writers.jsonl import read_metrics
from mlm_train.parallel.engine.base import Engine, parameter_groups
from mlm_train.parallel.pipeline.x0 import Channel
from mlm_train.parallel.runtime import Runtime
from mlm_train.tol.format.index_file import index_at
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.storage.resolve import storage_at


class RowByRow:
    """A memory mode: FFN-M at every position, one sequence of a micro-batch after the other."""

    def __init__(self, blocks: Mapping[int, MemoryBlock], options: SourceOptions) -> None:
        self.blocks = blocks

    def open(self, ids: Tensor, x0: Tensor) -> MemoryReader:
        """ids: [batch, sequence]; x0 and what the reader returns: [batch, local positions, hidden]."""

        def read(layer: int) -> Tensor:
            return torch.cat([self.blocks[layer].ffn_m_of_micro_batch(row) for row in x0.split(1)])

        return read

    def evaluations(self, tokens: int, distinct: int) -> int:
        """FFN-M evaluations of a step on this rank: one per layer and position."""
        return len(self.blocks) * tokens


class SendRecv(Channel):
    """A transport: the first stage sends the step's distinct rows to the others and gets gradients back."""

    relays = False

    def __post_init__(self) -> None:
        self.first, *self.others = dist.get_process_group_ranks(self.group)
        self.is_first = dist.get_rank() == self.first
        self.anchor = torch.zeros(1, device=self.device, requires_grad=True)

    def begin(self, plan: Tensor) -> Tensor:
        """The step's ids [micro-batches * batch, sequence] -> index of each position's row, of that shape."""
        distinct, index = plan.to(self.device).unique(return_inverse=True)
        if self.is_first:
            self.embedded = self.model.rows(distinct)
            self.rows = self.embedded.detach().clone()
            for other in self.others:
                dist.send(self.rows, other, group=self.group)
        else:
            self.rows = torch.empty(len(distinct), self.model.config.hidden_size, device=self.device)
            dist.recv(self.rows, self.first, group=self.group)
        self.table = torch.zeros_like(self.rows)
        return index

    def x0(self, ids: Tensor, index: Tensor) -> Tensor:
        """x0 of a micro-batch; its gradient is added to the table."""
        return Lookup.apply(self.tensor.local(index, 1), self.rows, self.table, self.anchor)

    def finish(self) -> None:
        """Sum the gradient tables of all stages on the first one, and run its backward pass."""
        if not self.is_first:
            dist.send(self.table, self.first, group=self.group)
            return
        for other in self.others:
            theirs = torch.empty_like(self.table)
            dist.recv(theirs, other, group=self.group)
            self.table += theirs
        table = self.tensor.all_reduce(self.table) if self.tensor.shards > 1 else self.table
        self.embedded.backward(table)

    def bytes_per_step(self, distinct: int, tokens: int) -> int:
        """Bytes sent: rows and their gradients in fp32."""
        return 2 * 4 * distinct * self.model.config.hidden_size * len(self.others)


class PlainAdamW(Engine):
    """An engine: AdamW with whole gradients on every rank, for data parallelism only."""

    def __init__(
        self, model: nn.Module, config: Config, runtime: Runtime, roots: Sequence[nn.Module]
    ) -> None:
        super().__init__(model, config, runtime, roots)
        if runtime.topology.tensor * runtime.topology.pipeline > 1:
            raise UserError(
                "parallel.engine=tests.extensions:PlainAdamW supports data parallelism only: set "
                "parallel.tensor=1 and parallel.pipeline=1"
            )
        self.world, options = runtime.topology.world, config.optimizer
        groups = parameter_groups(model, options)
        self.optimizer = torch.optim.AdamW(groups, options.lr, betas=options.betas, eps=options.eps)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Average gradients over the ranks, once per step."""
        yield
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= self.world

    def step(self, lr: float) -> float:
        """Update the weights; the gradient norm before clipping, infinite if the update was skipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or torch.inf))
        finite = norm < torch.inf
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm if finite else torch.inf


class Scratch(LocalFolder):
    """A storage: scratch://NAME is a folder below the environment variable SCRATCH."""

    def __init__(self, url: str) -> None:
        super().__init__(Path(os.environ["SCRATCH"]) / url.removeprefix("scratch://"))
        self.address = url  # workers recreate it with their own node's variable


class CountRows:
    """A command: a module or class with these three names."""

    HELP = "Print the number of rows of a ToL.\n\nexample:\n  mlm-train count-rows tol/mine"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""
        parser.add_argument("table", help="folder or URL of a ToL")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Run the command; return the exit code."""
        print(f"{index_at(storage_at(args.table)).vocab_size} rows")
        return 0


class LowestLoss(Callback):
    """A callback: the lowest training loss of this launch, as a metric, and in a log line at the end."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.lowest = float("inf")

    def after_step(self, report: StepReport) -> None:
        """Called on every rank with the same loss; only rank 0 writes."""
        self.lowest = min(self.lowest, report.result.loss)
        self.context.writers.scalars({"train/lowest_loss": self.lowest}, report.progress.step)

    def on_train_end(self) -> None:
        """Called before the log is closed."""
        self.context.say(f"lowest loss {self.lowest:.4f}")


class CsvWriter:
    """A metrics writer: train.output/metrics.csv, one value per line."""

    def __init__(self, config: Config, first_step: int) -> None:
        self.path = Path(config.train.output) / "metrics.csv"
        self.path.touch()
        self.purge(first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Append one line per value."""
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows((step, tag, value) for tag, value in values.items())

    def purge(self, step: int) -> None:
        """Remove the lines of that step and later ones."""
        with open(self.path, newline="") as file:
            kept = [row for row in csv.reader(file) if int(row[0]) < step]
        with open(self.path, "w", newline="") as file:
            csv.writer(file).writerows(kept)

    def close(self) -> None:
        """Nothing is open."""


def losses_and_norms(config: Path, run: Path, *overrides: str, processes: int = 1) -> list[float | None]:
    """Losses, then gradient norms, of the steps of a new run."""
    command = ["launch", "--nproc", str(processes)] if processes > 1 else ["pretrain"]
    words = [*command, config, f"train.output={run}", "monitor.writers=[jsonl]", *overrides]
    subprocess.run([sys.executable, "-m", "mlm_train", *map(str, words)], check=True)
    metrics = read_metrics(run)
    return [*metrics["train/loss"].values(), *metrics["train/grad_norm"].values()]
