"""Callbacks: when and on which ranks hooks are called; the built-in ones need no process group."""

import math
from pathlib import Path

import pytest
import torch

from mlm_train.config import load_config
from mlm_train.data.samples import Consumed
from mlm_train.errors import START_AGAIN
from mlm_train.monitor.build import OURS, build_callbacks
from mlm_train.monitor.callback import Callback, Callbacks, Context
from mlm_train.monitor.log import Log
from mlm_train.monitor.report import Evaluation, Progress, Rollback, Saved, SkippedStep, StepReport
from mlm_train.monitor.writers import Writers
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.mesh.groups import ProcessGroups
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.runtime import Runtime
from mlm_train.train import results
from mlm_train.train.signals import Signals
from mlm_train.train.step import StepResult
from tests.commands import TINY, finished, mlm_train, outcome
from tests.train.test_guard import SPIKE, bad_labels, spoil


class Diary(Callback):
    """Each rank records its hook calls in train.output/diary-RANK."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.path = Path(self.config.train.output) / f"diary-{context.runtime.topology.rank}"

    def note(self, line: str) -> None:
        with open(self.path, "a") as file:
            file.write(f"{line}\n")

    def on_train_start(self, progress: Progress) -> None:
        self.note(f"start after {progress.step}")

    def before_step(self, progress: Progress) -> None:
        self.note(f"before {progress.step + 1}")

    def after_step(self, report: StepReport) -> None:
        assert report.seconds >= report.data_seconds
        self.note(f"after {report.progress.step} {report.result.loss:.6f}")

    def before_evaluation(self, progress: Progress) -> None:
        self.note(f"before validation {progress.step}")

    def after_evaluation(self, report: Evaluation) -> None:
        self.note(f"validation {report.progress.step} {report.loss:.6f}")

    def after_save(self, saved: Saved) -> None:
        assert (saved.folder / "manifest.json").is_file()
        self.note(f"saved {saved.folder.name}")

    def on_fault(self, fault: SkippedStep | Rollback) -> None:
        if isinstance(fault, SkippedStep):
            self.note(f"skipped {fault.progress.step}: {fault.reason[:12]}")
        else:
            self.note(f"{fault.progress.step} back to {fault.checkpoint}, step {fault.back.step}")

    def on_train_end(self) -> None:
        self.note("end")


class Stumbling(Diary):
    """Raises in after_step and in on_train_end."""

    def after_step(self, report: StepReport) -> None:
        raise ValueError("the third stair is missing")

    def on_train_end(self) -> None:
        raise ValueError("and the fourth")


def pretrain(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}", "memory.mode=unique",
        "monitor.peak_tflops=1", "monitor.callbacks=[tests.monitor.test_callbacks:Diary]", *more,
    ]  # fmt: skip


def hooks(run: Path, rank: int = 0) -> list[str]:
    """The recorded calls of a rank, without losses."""
    lines = (run / f"diary-{rank}").read_text().splitlines()
    return [line.rsplit(" ", 1)[0] if line.startswith(("after", "validation")) else line for line in lines]


def test_every_rank_comes_to_every_hook_with_the_same_values(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("train.steps=3", "train.eval_interval=2", "checkpoint.interval=2", "checkpoint.async_save=false")
    finished("launch", "--nproc", 2, *pretrain(data, run, *more))
    assert hooks(run) == [
        "start after 0", "before 1", "after 1", "before 2", "after 2", "before validation 2", "validation 2",
        "saved step-00000002", "before 3", "after 3", "before validation 3", "validation 3",
        "saved step-00000003", "end",
    ]  # fmt: skip
    assert (run / "diary-0").read_text() == (run / "diary-1").read_text()


def test_a_skipped_step_and_a_resumed_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    more = ("checkpoint.interval=0", "schedule.total_steps=9")
    with monkeypatch.context() as patch:
        spoil(patch, {2}.__contains__)
        mlm_train("pretrain", *pretrain(data, run, *more, "train.steps=3"))
    assert hooks(run)[3:6] == ["before 2", "skipped 2: non-finite g", "after 2"]
    mlm_train("pretrain", *pretrain(data, run, *more, "train.steps=4"))
    assert hooks(run)[-7:-4] == ["start after 3", "before 4", "after 4"]


def test_on_a_gpu_results_come_one_step_late(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a validation all of them are there, and a signal ends the run after the step launched last."""
    run = tmp_path / "run"
    monkeypatch.setattr(results, "reads_late", lambda _: True)
    heard, calls = Signals.heard, iter(range(1, 1000))
    monkeypatch.setattr(Signals, "heard", lambda self: [float(next(calls) == 5), heard(self)[1]])
    with monkeypatch.context() as patch:
        spoil(patch, {2}.__contains__)
        code, _ = outcome("pretrain", *pretrain(data, run, "train.eval_interval=3", "train.steps=9"))
    assert code == START_AGAIN
    assert hooks(run)[1:-2] == [
        "before 1", "before 2", "after 1", "before 3", "skipped 2: non-finite g", "after 2", "after 3",
        "before validation 3", "validation 3", "before 4", "before 5", "after 4", "before 6", "after 5",
        "after 6", "before validation 6", "validation 6",
    ]  # fmt: skip
    assert hooks(run)[-2:] == ["saved step-00000006", "end"]
    assert "stopped by SIGUSR1 after step 6" in (run / "train.log").read_text()


def test_a_loss_spike(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    bad_labels(monkeypatch, 15 * 8)
    mlm_train("pretrain", *pretrain(data, run, *SPIKE))
    calls = [line for line in hooks(run) if not line.startswith("saved")]  # those come at any time
    at = calls.index("16 back to step-00000010, step 10")
    assert calls[at - 1] == "after 16" and calls[at + 1] == "before 11"


def test_a_failure_in_a_hook_ends_the_run_and_the_other_callbacks_end_too(data: Path, tmp_path: Path) -> None:
    run, own = tmp_path / "run", "tests.monitor.test_callbacks"
    more = (f"monitor.callbacks=[{own}:Diary, {own}:Stumbling, {own}:Diary]", "train.steps=2")
    with pytest.raises(ValueError, match="the fourth") as failure:
        outcome("pretrain", *pretrain(data, run, *more))
    assert "the third stair" in str(failure.value.__context__)
    assert hooks(run).count("end") == 2
    assert '"state": "ended"' in (run / "heartbeat.json").read_text()
    processes.stop()


def reports(output: Path) -> list[tuple[str, object]]:
    """(hook, argument) pairs as in a short run of two ranks."""
    progress = Progress(step=1, samples=8, tokens=256)
    result = StepResult(
        loss=6.0, grad_norm=math.inf, tokens=256, distinct_micro=0.5, distinct_step=0.4,
        ffn_m_evaluations=1.0, seconds=0.5, asked=None, waited=[0.0, 0.1], forward=[0.1, 0.4],
        peak_memory=[1.0, 2.0], fault="gradient",
    )  # fmt: skip
    return [
        ("on_train_start", Progress()),
        ("before_step", Progress()),
        ("on_fault", SkippedStep(progress, "gradient")),
        ("after_step", StepReport(progress, 1e-3, 8, result, 0.1, {"only": Consumed(8, 256, 0.1)})),
        ("before_evaluation", progress),
        ("after_evaluation", Evaluation(progress, 5.0, 8, 0.1, {"only": (5.0, 8)})),
        ("after_save", Saved(output / "step-00000001", 0.2, 0.1)),
        ("on_fault", Rollback(progress, Progress(), "step-00000000")),
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_built_in_callbacks_use_no_collective_and_only_rank_0_writes(rank: int, tmp_path: Path) -> None:
    """Two ranks without a process group: a collective would raise."""
    processes.stop()  # process groups of an earlier test
    assert not torch.distributed.is_initialized()
    words = [
        "data.path=none",
        f"train.output={tmp_path}",
        "train.micro_batch_size=1",
        "monitor.straggler_interval=1",
    ]
    config = load_config("configs/micro.yaml", [*words, "monitor.peak_tflops=1"])
    groups = ProcessGroups(tensor=None, data=None, pipeline=None, model=None, embedding=None)
    runtime = Runtime(Topology.of(config.parallel, 2, rank), torch.device("cpu"), groups)
    log, writers = Log(tmp_path if runtime.is_rank_0 else None), Writers()
    if runtime.is_rank_0:
        writers.open(config, 1)
    callbacks = build_callbacks(Context(config, runtime, ["a", "b"], log, writers))
    assert tuple(map(type, callbacks.callbacks)) == OURS
    for hook, argument in reports(tmp_path):
        getattr(callbacks, hook)(argument)
    callbacks.on_train_end()
    writers.close()
    log.close()
    written = {path.name for path in tmp_path.iterdir()}
    assert written == ({"train.log", "heartbeat.json", "tensorboard"} if rank == 0 else set())
    if rank == 0:
        lines = (tmp_path / "train.log").read_text()
        assert "slow over the last 1 steps: rank 1 (b, stage 0)" in lines and "step 1 SKIPPED" in lines


def test_the_list_has_every_hook() -> None:
    """Callbacks overrides all hooks: a forgotten one would silently do nothing."""
    assert {name for name in vars(Callback) if not name.startswith("_")} == {
        name for name in vars(Callbacks) if not name.startswith("_")
    }
