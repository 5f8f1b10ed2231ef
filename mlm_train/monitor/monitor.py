"""The monitor of a run: turns reports into a log line, TensorBoard events and a progress bar.

The loop only reports; what is shown lives here, on the leading rank.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mlm_train.config import Config
from mlm_train.data.samples import Consumed
from mlm_train.errors import escaped
from mlm_train.model.counts import train_flops_per_token
from mlm_train.monitor.events import Appended, Events
from mlm_train.monitor.heartbeat import Heartbeat
from mlm_train.monitor.report import Evaluation, Progress, Saved, StepReport
from mlm_train.monitor.resources import peak_flops
from mlm_train.monitor.stragglers import Stragglers
from mlm_train.parallel.runtime import Runtime


class Monitor:
    """Shows a run. On ranks that do not lead, every method is silent. `hosts`: each rank's machine.

    A disk that takes no more costs what is shown, and never the run.
    """

    def __init__(self, config: Config, runtime: Runtime, progress: Progress, hosts: Sequence[str]) -> None:
        self.config, self.runtime = config, runtime
        self.peaks = peak_flops(runtime.device, config.train.precision, config.monitor.peak_tflops)
        self.recent: deque[float] = deque(maxlen=50)
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.log: Appended | None = None
        self.events: Events | None = None
        self.bar: Bar | None = None
        self.stragglers = Stragglers(runtime.topology, hosts)
        if not runtime.is_rank_0:
            return
        output = Path(config.train.output)
        self.log = Appended(output / "train.log")
        self.heartbeat = Heartbeat(output)
        self.heartbeat.beat("starting", step=progress.step, steps=config.train.steps)
        self._open_events(progress)
        if self.console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("train", total=config.train.steps, completed=progress.step)
            self.bar.start()

    def _open_events(self, progress: Progress) -> None:
        if self.config.monitor.tensorboard:
            # Steps after a crash were not committed: their events are dropped, not doubled.
            folder = Path(self.config.train.output) / "tensorboard"
            self.events = Events(folder, purge_step=progress.step + 1)

    def say(self, line: str) -> None:
        """One line on the terminal and in train.log."""
        if self.log is None:
            return
        line = escaped(line)
        with contextlib.suppress(OSError):  # a job's output is a file too
            self.console.print(line, markup=False)
        self.log.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())

    def step(self, report: StepReport) -> None:
        """A finished step: bar at once, line and events every monitor.log_interval steps."""
        self.recent.append(report.result.seconds + report.data_seconds)
        if self.log is None:
            return
        step, last = report.progress.step, self.config.train.steps
        left = (last - step) * sum(self.recent) / len(self.recent)
        self._beat(report, left)
        if report.result.fault is not None:
            skipped = f"{report.progress.skipped} skipped in all"
            self.say(f"step {step} SKIPPED, weights are as before ({skipped}): {report.result.fault}")
        self._compare_ranks(report)
        if self.bar is not None:
            self.bar.update(self.task, completed=step)
        if step % self.config.monitor.log_interval and step != last:
            return
        values = self.step_values(report)
        self.say(
            f"step {step}/{last} | loss {values['train/loss']:.4f} | ppl {values['train/perplexity']:.2f} | "
            f"lr {report.lr:.2e} | grad {values['train/grad_norm']:.3f} | "
            f"{values['speed/tokens_per_second']:.0f} tok/s | mfu {self._mfu_words(values)} | "
            f"distinct {values['data/distinct_ratio_step']:.3f} | {values['speed/step_seconds']:.2f} s | "
            f"{_epochs(report.consumed)}left {_clock(left)}"
        )
        self._scalars(values, step)

    def _beat(self, report: StepReport, left: float) -> None:
        progress, result = report.progress, report.result
        self.heartbeat.beat(
            "training",
            step=progress.step,
            loss=result.loss if math.isfinite(result.loss) else None,
            step_seconds=round(result.seconds + report.data_seconds, 3),
            seconds_left=round(left),
            skipped=progress.skipped,
        )

    def _compare_ranks(self, report: StepReport) -> None:
        """Every monitor.straggler_interval steps: which ranks make the others wait."""
        monitor, step = self.config.monitor, report.progress.step
        self.stragglers.add(report.result.forward, report.result.waited)
        if self.stragglers.steps < monitor.straggler_interval or not (paces := self.stragglers.take()):
            return
        self._scalars({"speed/slowest_rank": paces[0].rank, "speed/slowest_rank_ratio": paces[0].ratio}, step)
        for pace in paces[:4]:
            if pace.ratio >= monitor.straggler_ratio:
                self.say(f"slow over the last {monitor.straggler_interval} steps: {pace}")

    def rolled_back(self, progress: Progress, back: Progress, checkpoint: str) -> None:
        """A loss spike, and where the run goes on instead."""
        if self.log is None:
            return
        self.say(
            f"loss spike at step {progress.step}: back to {checkpoint} (rollback {back.rollbacks}), "
            f"on with sample {back.samples}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=back.step)
        if (before := self.events) is not None:
            with contextlib.suppress(OSError):  # of a full disk: the old file does
                self._open_events(back)
                before.close()

    def step_values(self, report: StepReport) -> dict[str, float]:
        """TensorBoard's scalars of a step, by tag."""
        result = report.result
        seconds = result.seconds + report.data_seconds
        model = self.config.model
        ffn_m_ratio = result.ffn_m_evaluations / model.num_hidden_layers
        flops = train_flops_per_token(model, self.config.data.sequence_length, ffn_m_ratio)
        rate = result.tokens / seconds
        mfu = {
            f"speed/mfu_{name}": rate * flops / (peak * self.runtime.topology.world)
            for name, peak in self.peaks.items()
        }
        by_source = {
            f"data/{what}/{name}": float(value)
            for name, consumed in report.consumed.items()
            for what, value in consumed._asdict().items()
        }
        values = {
            "train/loss": result.loss,
            "train/perplexity": perplexity(result.loss),
            "train/lr": report.lr,
            "train/grad_norm": result.grad_norm,
            "train/global_batch": report.batch,
            "train/tokens": report.progress.tokens,
            "train/skipped_steps": report.progress.skipped,
            "speed/tokens_per_second": rate,
            "speed/step_seconds": seconds,
            "speed/data_seconds": report.data_seconds,
            "memory/peak_gib": max(result.peak_memory) / 2**30,
            "memory/peak_gib_rank": result.peak_memory.index(max(result.peak_memory)),
            "data/distinct_ratio_micro_batch": result.distinct_micro,
            "data/distinct_ratio_step": result.distinct_step,
        }
        if model.has_memory:
            values["data/ffn_m_ratio"] = ffn_m_ratio
        return by_source | mfu | values

    def _mfu_words(self, values: Mapping[str, float]) -> str:
        return ", ".join(f"{values[f'speed/mfu_{name}']:.1%} of {name}" for name in self.peaks)

    def evaluation(self, report: Evaluation) -> None:
        """Validation loss; of a blend each source's too."""
        sources = report.by_source if len(self.config.data.blend or ()) > 1 else {}
        losses = ", ".join(f"{name} {loss:.4f} of {number}" for name, (loss, number) in sources.items())
        self.say(
            f"validation at step {report.progress.step} | loss {report.loss:.4f} | "
            f"ppl {perplexity(report.loss):.2f} | {f'{losses} | ' if losses else ''}"
            f"{report.samples} sequences | {report.seconds:.1f} s"
        )
        values = {"validation/loss": report.loss, "validation/perplexity": perplexity(report.loss)}
        for name, (loss, _) in sources.items():
            values |= {f"validation/loss/{name}": loss, f"validation/perplexity/{name}": perplexity(loss)}
        self._scalars(values, report.progress.step)

    def committed(self, saved: Saved) -> None:
        """A checkpoint that is on disk."""
        stood = f", training stood still for {saved.stall:.2f} s"
        self.say(f"checkpoint {saved.folder} committed in {saved.seconds:.1f} s{stood}")

    def _scalars(self, values: dict[str, float], step: int) -> None:
        if self.events is not None:
            self.events.scalars(values, step)

    def close(self) -> None:
        """Flush and close everything."""
        if self.log is not None:
            done = self.heartbeat.values["step"] >= self.config.train.steps
            self.heartbeat.beat("finished" if done else "ended")
        with contextlib.ExitStack() as stack:
            for part, close in ((self.bar, "stop"), (self.events, "close"), (self.log, "close")):
                if part is not None:
                    stack.callback(getattr(part, close))
        self.log = None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def _epochs(consumed: Mapping[str, Consumed]) -> str:
    """Of a blend: how often each source has been gone through."""
    if len(consumed) == 1:
        return ""
    return "epochs " + ", ".join(f"{name} {some.epochs:.3g}" for name, some in consumed.items()) + " | "


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
