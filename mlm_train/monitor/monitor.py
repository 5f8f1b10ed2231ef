"""The monitor of a run: log lines, metrics and a progress bar."""

from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mlm_train.data.samples import Consumed
from mlm_train.model.counts import train_flops_per_token
from mlm_train.monitor.callback import Callback, Context
from mlm_train.monitor.report import Evaluation, Progress, Rollback, Saved, SkippedStep, StepReport
from mlm_train.monitor.resources import peak_flops
from mlm_train.monitor.time_left import TimeLeft
from mlm_train.utils.units import perplexity


class Monitor(Callback):
    """Logs a run on rank 0. A full disk costs log lines and metrics, never the run."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        train = self.config.train
        device = context.runtime.device
        self.peaks = peak_flops(device, train.precision, self.config.monitor.peak_tflops)
        self.time_left = TimeLeft(train.steps)
        self.bar: Bar | None = None

    def on_train_start(self, progress: Progress) -> None:
        """Show a progress bar if there is a terminal."""
        console = self.context.log.console
        if self.context.runtime.is_rank_0 and console.is_terminal:
            columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=console)
            self.task = self.bar.add_task("train", total=self.config.train.steps, completed=progress.step)
            self.bar.start()

    def after_step(self, report: StepReport) -> None:
        """Update the bar; log the line and metrics every monitor.log_interval steps and at the last one."""
        step, last = report.progress.step, self.config.train.steps
        left = self.time_left.after(report)
        self._show_step(step)
        if not self.context.runtime.is_rank_0 or (step % self.config.monitor.log_interval and step != last):
            return
        values = self.step_values(report)
        self.context.say(
            f"step {step}/{last} | loss {values['train/loss']:.4f} | ppl {values['train/perplexity']:.2f} | "
            f"lr {report.lr:.2e} | grad {values['train/grad_norm']:.3f} | "
            f"{values['speed/tokens_per_second']:.0f} tok/s | mfu {self._mfu_text(values)} | "
            f"distinct {values['data/distinct_ratio_step']:.3f} | {values['speed/step_seconds']:.2f} s | "
            f"{_epochs(report.consumed)}left {_clock(left)}"
        )
        self.context.writers.scalars(values, step)

    def _show_step(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def on_fault(self, fault: SkippedStep | Rollback) -> None:
        """Log it; after a rollback, discard metrics of the steps that will be repeated."""
        step = fault.progress.step
        if isinstance(fault, SkippedStep):
            skipped = f"{fault.progress.skipped} skipped so far"
            self.context.say(f"step {step} SKIPPED, weights unchanged ({skipped}): {fault.reason}")
            return
        self.context.say(
            f"loss spike at step {step}: rolled back to {fault.checkpoint} "
            f"(rollback {fault.back.rollbacks}), continuing with sample {fault.back.samples}"
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

    def _mfu_text(self, values: Mapping[str, float]) -> str:
        return ", ".join(f"{values[f'speed/mfu_{name}']:.1%} of {name}" for name in self.peaks)

    def after_evaluation(self, report: Evaluation) -> None:
        """Log the validation loss; for a blend, also that of each source; a line for each further set."""
        sources = dict(report.by_source) if len(self.config.data.blend or ()) > 1 else {}
        losses = ", ".join(f"{name} {loss:.4f} of {number}" for name, (loss, number) in sources.items())
        self.context.say(
            f"validation at step {report.progress.step} | loss {report.loss:.4f} | "
            f"ppl {perplexity(report.loss):.2f} | {f'{losses} | ' if losses else ''}"
            f"{report.samples} sequences | {report.seconds:.1f} s"
        )
        values = {"validation/loss": report.loss, "validation/perplexity": perplexity(report.loss)}
        for name, (loss, number) in report.further.items():
            self.context.say(
                f"validation on {name} at step {report.progress.step} | loss {loss:.4f} | "
                f"ppl {perplexity(loss):.2f} | {number} sequences"
            )
        for name, (loss, _) in (sources | dict(report.further)).items():
            values |= {f"validation/loss/{name}": loss, f"validation/perplexity/{name}": perplexity(loss)}
        self.context.writers.scalars(values, report.progress.step)

    def after_save(self, saved: Saved) -> None:
        """Log a checkpoint that is on disk."""
        blocked = f"training blocked for {saved.stall:.2f} s"
        self.context.say(f"checkpoint {saved.folder} committed in {saved.seconds:.1f} s, {blocked}")

    def on_train_end(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.stop()


def _epochs(consumed: Mapping[str, Consumed]) -> str:
    """For a blend: the epochs consumed of each source; else empty."""
    if len(consumed) == 1:
        return ""
    return "epochs " + ", ".join(f"{name} {source.epochs:.3g}" for name, source in consumed.items()) + " | "


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
