"""Callbacks: what looks on while a run trains. The monitor is made of them, and a user adds more.

A callback is made as `Class(context)` on every rank, and every rank calls every hook of it, in the order of
the list: heartbeat, stragglers, monitor, then those of config field monitor.callbacks.

| hook | when, on every rank |
|---|---|
| on_train_start | before the first step of a launch; the model is built and loaded |
| before_step | before a step's data are taken |
| on_fault | a step was skipped (before its after_step), or a loss spike has taken the run back |
| after_step | after every step, a skipped one too |
| before_evaluation, after_evaluation | around each validation |
| after_save | once a checkpoint is on disk |
| on_train_end | last of all, whatever has ended the run |

Reports hold the same values on every rank. All ranks come to a hook at the same step, so a callback may use
collectives in it, but in two: after_save comes when a rank's own thread has seen the commit, and on_train_end
on a rank that fails comes there alone. What prints or writes does so on rank 0 (`context.runtime.is_rank_0`);
`context.say` and `context.writers` are silent elsewhere by themselves. Our own callbacks use no collective.
An exception in a hook ends the run, as one in a step does.
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
    """What a callback is made with. `hosts`: each rank's machine."""

    config: Config
    runtime: Runtime
    hosts: Sequence[str]
    log: Log
    writers: Writers

    @property
    def say(self) -> Callable[[str], None]:
        """Takes a line for the terminal and train.log; silent on ranks that do not lead."""
        return self.log.say


class Callback:
    """Hooks of a run that do nothing; see the module for when each is called, and where."""

    def __init__(self, context: Context) -> None:
        self.context, self.config = context, context.config

    def on_train_start(self, progress: Progress) -> None:
        """progress: how far the run is, of a new one nothing."""

    def before_step(self, progress: Progress) -> None:
        """progress: before the step."""

    def after_step(self, report: StepReport) -> None:
        """What a step did."""

    def before_evaluation(self, progress: Progress) -> None:
        """progress: whose weights are validated."""

    def after_evaluation(self, report: Evaluation) -> None:
        """A validation's losses."""

    def after_save(self, saved: Saved) -> None:
        """A checkpoint that is on disk."""

    def on_fault(self, fault: SkippedStep | Rollback) -> None:
        """What went wrong, and what the run did about it."""

    def on_train_end(self) -> None:
        """Close what on_train_start opened, if it came to that."""


class Callbacks(Callback):
    """Several as one, each called in order."""

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
        """Each of them, whatever one of them raises; the first such failure is raised after all."""
        each([callback.on_train_end for callback in self.callbacks])
