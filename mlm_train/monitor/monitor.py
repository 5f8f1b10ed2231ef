"""The monitor of a run: turns reports into a log line, TensorBoard events and a progress bar.

The loop only reports; what is shown lives here, on the leading rank.
"""

import contextlib
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mlm_train.config import Config
from mlm_train.model.counts import train_flops_per_token
from mlm_train.monitor.report import Evaluation, Progress, Step, StepReport
from mlm_train.monitor.resources import measured_peak_flops, peak_memory_bytes
from mlm_train.parallel.runtime import Runtime


class Monitor:
    """Shows a run. On ranks that do not lead, every method is silent."""

    def __init__(self, config: Config, runtime: Runtime, progress: Progress) -> None:
        self.config, self.runtime = config, runtime
        peak = config.monitor.peak_tflops
        self.peak_flops = (
            measured_peak_flops(runtime.device, config.train.precision) if peak is None else peak * 1e12
        )
        self.recent: deque[float] = deque(maxlen=50)
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.log = None
        self.events: Any = None
        self.bar: Bar | None = None
        if not runtime.leads:
            return
        output = Path(config.train.output)
        self.log = (output / "train.log").open("a", encoding="utf-8")
        if config.monitor.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Steps after a crash were not committed: their events are dropped, not doubled.
            self.events = SummaryWriter(str(output / "tensorboard"), purge_step=progress.step + 1)
        if self.console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("train", total=config.train.steps, completed=progress.step)
            self.bar.start()

    def say(self, line: str) -> None:
        """One line on the terminal and in train.log."""
        if self.log is None:
            return
        self.console.print(line, markup=False)
        self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self.log.flush()

    def step(self, report: StepReport) -> None:
        """A finished step: bar at once, line and events every monitor.log_every steps."""
        self.recent.append(report.result.seconds + report.data_seconds)
        if self.log is None:
            return
        step, last = report.progress.step, self.config.train.steps
        if self.bar is not None:
            self.bar.update(self.task, completed=step)
        if step % self.config.monitor.log_every and step != last:
            return
        values = self.step_values(report)
        left = (last - step) * sum(self.recent) / len(self.recent)
        self.say(
            f"step {step}/{last} | loss {values['train/loss']:.4f} | ppl {values['train/perplexity']:.2f} | "
            f"lr {report.lr:.2e} | grad {values['train/grad_norm']:.3f} | "
            f"{values['speed/tokens_per_second']:.0f} tok/s | mfu {values['speed/mfu']:.1%} | "
            f"distinct {values['data/distinct_ratio_step']:.3f} | {values['speed/step_seconds']:.2f} s | "
            f"left {_clock(left)}"
        )
        self._scalars(values, step)

    def step_values(self, report: StepReport) -> dict[str, float]:
        """TensorBoard's scalars of a step, by tag."""
        result = report.result
        seconds = result.seconds + report.data_seconds
        flops = train_flops_per_token(
            self.config.model, self.config.data.sequence_length, self._ffn_m_ratio(result)
        )
        rate = result.tokens / seconds
        return {
            "train/loss": result.loss,
            "train/perplexity": perplexity(result.loss),
            "train/lr": report.lr,
            "train/grad_norm": result.grad_norm,
            "train/global_batch": report.batch,
            "train/tokens": report.progress.tokens,
            "speed/tokens_per_second": rate,
            "speed/mfu": rate * flops / (self.peak_flops * self.runtime.topology.world),
            "speed/step_seconds": seconds,
            "speed/data_seconds": report.data_seconds,
            "memory/peak_gib": peak_memory_bytes(self.runtime.device) / 2**30,
            "data/distinct_ratio_micro_batch": result.distinct_micro,
            "data/distinct_ratio_step": result.distinct_step,
        }

    def _ffn_m_ratio(self, result: Step) -> float:
        """FFN-M evaluations a token, as the mode needs them; what is run again does not count."""
        memory, layers = self.config.memory, self.config.model.num_hidden_layers
        if memory is None or memory.mode == "per_token":
            return 1.0
        if memory.mode == "unique":
            return result.distinct_micro
        tabled = min(layers, memory.tabled(layers) * self.runtime.topology.pipeline) / layers
        return tabled * result.table_rows + (1 - tabled) * result.distinct_micro

    def evaluation(self, report: Evaluation) -> None:
        """Validation loss."""
        self.say(
            f"validation at step {report.progress.step} | loss {report.loss:.4f} | "
            f"ppl {perplexity(report.loss):.2f} | {report.samples} sequences | {report.seconds:.1f} s"
        )
        values = {"validation/loss": report.loss, "validation/perplexity": perplexity(report.loss)}
        self._scalars(values, report.progress.step)

    def committed(self, folder: Path, seconds: float) -> None:
        """A checkpoint that is on disk."""
        self.say(f"checkpoint {folder} committed in {seconds:.1f} s")

    def _scalars(self, values: dict[str, float], step: int) -> None:
        if self.events is None:
            return
        for tag, value in values.items():
            self.events.add_scalar(tag, value, step)
        self.events.flush()

    def close(self) -> None:
        """Flush and close everything."""
        with contextlib.ExitStack() as stack:
            for part, close in ((self.bar, "stop"), (self.events, "close"), (self.log, "close")):
                if part is not None:
                    stack.callback(getattr(part, close))
        self.log = None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
