"""Callbacks: observers of a run. Heartbeat, stragglers and monitor are callbacks; users can add more.

A callback is created as `Class(context)` on every rank, and every rank calls all its hooks, in this order:
heartbeat, stragglers, monitor, then those of config field monitor.callbacks.

| hook | when, on every rank |
|---|---|
| on_train_start | before the first step of a launch, with the model built and loaded |
| before_step | before a step's batches are read |
| on_fault | after a skipped step (before its after_step), or after a rollback from a loss spike |
| after_step | when a step's results are there, of every step, including skipped ones |
| before_evaluation, after_evaluation | around each validation |
| after_save | when a checkpoint is on disk |
| on_train_end | at the end, whatever ended the run |

A GPU's results are read once the next step has been launched, so that it never waits: before_step of step 2
comes before after_step of step 1. Before a validation or a checkpoint all results are read.

Reports hold the same values on every rank. All ranks reach a hook at the same step, so a callback may use
collectives, except in two hooks: after_save is called when a rank's own thread has seen the commit, and
on_train_end is called alone on a rank that fails. Print and write on rank 0 only
(`context.runtime.is_rank_0`); `context.say` and `context.writers` do nothing on other ranks. The built-in
callbacks use no collectives. An exception in a hook ends the run, like one in a step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mlm_train.config import Config
from mlm_train.monitor.log import Log
from mlm_train.monitor.report import Evaluation, Progress, Rollback, Saved, SkippedStep, StepReport
from mlm_train.monitor.writers import Writers, each
from mlm_train.parallel.runtime import Runtime


@dataclass(frozen=True)
class Context:
    """What a callback is created with. hosts: host name by rank."""

    config: Config
    runtime: Runtime
    hosts: Sequence[str]
    log: Log
    writers: Writers

    @property
    def say(self) -> Callable[[str], None]:
        """Logs a line to the terminal and train.log; does nothing on other ranks than 0."""
        return self.log.say


class Callback:
    """Base class whose hooks do nothing; the module's docstring lists when and where each is called."""

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config

    def on_train_start(self, progress: Progress) -> None:
        """progress: of the resumed checkpoint; zero for a new run."""

    def before_step(self, progress: Progress) -> None:
        """progress: before the step."""

    def after_step(self, report: StepReport) -> None:
        """report: the result of a step."""

    def before_evaluation(self, progress: Progress) -> None:
        """progress: at the validated weights."""

    def after_evaluation(self, report: Evaluation) -> None:
        """report: losses of a validation."""

    def after_save(self, saved: Saved) -> None:
        """saved: a checkpoint that is on disk."""

    def on_fault(self, fault: SkippedStep | Rollback) -> None:
        """fault: a skipped step, or a rollback."""

    def on_train_end(self) -> None:
        """Close what on_train_start opened; it may not have been called."""


class Callbacks(Callback):
    """Several callbacks as one, called in order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)

    def on_train_start(self, progress: Progress) -> None:
        for callback in self.callbacks:
            callback.on_train_start(progress)

    def before_step(self, progress: Progress) -> None:
        for callback in self.callbacks:
            callback.before_step(progress)

    def after_step(self, report: StepReport) -> None:
        for callback in self.callbacks:
            callback.after_step(report)

    def before_evaluation(self, progress: Progress) -> None:
        for callback in self.callbacks:
            callback.before_evaluation(progress)

    def after_evaluation(self, report: Evaluation) -> None:
        for callback in self.callbacks:
            callback.after_evaluation(report)

    def after_save(self, saved: Saved) -> None:
        for callback in self.callbacks:
            callback.after_save(saved)

    def on_fault(self, fault: SkippedStep | Rollback) -> None:
        for callback in self.callbacks:
            callback.on_fault(fault)

    def on_train_end(self) -> None:
        """Call all of them, even if some raise; then raise the first exception."""
        each([callback.on_train_end for callback in self.callbacks])
