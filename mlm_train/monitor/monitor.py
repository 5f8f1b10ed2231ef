"""The monitor of a run: turns reports into log lines, metrics and a progress bar."""

import math
from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mlm_train.data.samples import Consumed
from mlm_train.model.counts import train_flops_per_token
from mlm_train.monitor.callback import Callback, Context
from mlm_train.monitor.report import Evaluation, Progress, Rollback, Saved, SkippedStep, StepReport
from mlm_train.monitor.resources import peak_flops
from mlm_train.monitor.time_left import TimeLeft


class Monitor(Callback):
    """Shows a run, on the leading rank. A disk that takes no more costs what is shown, and never the run."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        train = self.config.train
        device = context.runtime.device
        self.peaks = peak_flops(device, train.precision, self.config.monitor.peak_tflops)
        self.time_left = TimeLeft(train.steps)
        self.bar: Bar | None = None

    def on_train_start(self, progress: Progress) -> None:
        """A progress bar where there is a terminal."""
        console = self.context.log.console
        if self.context.runtime.is_rank_0 and console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=console)
            self.task = self.bar.add_task("train", total=self.config.train.steps, completed=progress.step)
            self.bar.start()

    def after_step(self, report: StepReport) -> None:
        """Bar at once, line and metrics every monitor.log_interval steps."""
        step, last = report.progress.step, self.config.train.steps
        left = self.time_left.after(report)
        self._show_step(step)
        if not self.context.runtime.is_rank_0 or (step % self.config.monitor.log_interval and step != last):
            return
        values = self.step_values(report)
        self.context.say(
            f"step {step}/{last} | loss {values['train/loss']:.4f} | ppl {values['train/perplexity']:.2f} | "
            f"lr {report.lr:.2e} | grad {values['train/grad_norm']:.3f} | "
            f"{values['speed/tokens_per_second']:.0f} tok/s | mfu {self._mfu_words(values)} | "
            f"distinct {values['data/distinct_ratio_step']:.3f} | {values['speed/step_seconds']:.2f} s | "
            f"{_epochs(report.consumed)}left {_clock(left)}"
        )
        self.context.writers.scalars(values, step)

    def _show_step(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def on_fault(self, fault: SkippedStep | Rollback) -> None:
        """Says so; what writers hold of steps that will be done again is void."""
        step = fault.progress.step
        if isinstance(fault, SkippedStep):
            skipped = f"{fault.progress.skipped} skipped in all"
            self.context.say(f"step {step} SKIPPED, weights are as before ({skipped}): {fault.reason}")
            return
        self.context.say(
            f"loss spike at step {step}: back to {fault.checkpoint} (rollback {fault.back.rollbacks}), "
            f"on with sample {fault.back.samples}"
        )
        self._show_step(fault.back.step)
        self.context.writers.purge(fault.back.step + 1)

    def step_values(self, report: StepReport) -> dict[str, float]:
        """Metrics of a step, by tag."""
        result = report.result
        seconds = report.seconds
        model = self.config.model
        ffn_m_ratio = result.ffn_m_evaluations / model.num_hidden_layers
        flops = train_flops_per_token(model, self.config.data.sequence_length, ffn_m_ratio)
        rate = result.tokens / seconds
        mfu = {
            f"speed/mfu_{name}": rate * flops / (peak * self.context.runtime.topology.world)
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

    def after_evaluation(self, report: Evaluation) -> None:
        """Validation loss; of a blend each source's too."""
        sources = report.by_source if len(self.config.data.blend or ()) > 1 else {}
        losses = ", ".join(f"{name} {loss:.4f} of {number}" for name, (loss, number) in sources.items())
        self.context.say(
            f"validation at step {report.progress.step} | loss {report.loss:.4f} | "
            f"ppl {perplexity(report.loss):.2f} | {f'{losses} | ' if losses else ''}"
            f"{report.samples} sequences | {report.seconds:.1f} s"
        )
        values = {"validation/loss": report.loss, "validation/perplexity": perplexity(report.loss)}
        for name, (loss, _) in sources.items():
            values |= {f"validation/loss/{name}": loss, f"validation/perplexity/{name}": perplexity(loss)}
        self.context.writers.scalars(values, report.progress.step)

    def after_save(self, saved: Saved) -> None:
        """A checkpoint that is on disk."""
        stood = f", training stood still for {saved.stall:.2f} s"
        self.context.say(f"checkpoint {saved.folder} committed in {saved.seconds:.1f} s{stood}")

    def on_train_end(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


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
