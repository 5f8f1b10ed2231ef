"""Non-finite steps are skipped and counted; a loss spike rolls a run back and skips its samples."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlm_train.checkpoint.folders import committed
from mlm_train.checkpoint.load import open_checkpoint
from mlm_train.checkpoint.manifest import write_manifest
from mlm_train.cli import main
from mlm_train.parallel import runtime
from mlm_train.parallel.engine.fsdp import FsdpEngine
from mlm_train.train import loop, results
from mlm_train.train.batches import MicroBatch
from tests.commands import TINY, mlm_train, same_losses, scalars


def words(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "pretrain", "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}",
        "memory.mode=unique", "monitor.peak_tflops=1", *more,
    ]  # fmt: skip


def saved(run: Path) -> list[int]:
    """Steps of the committed checkpoints."""
    return [int(folder.name.removeprefix("step-")) for folder in committed(run / "checkpoints")]


def spoil(monkeypatch: pytest.MonkeyPatch, which: Callable[[int], bool]) -> None:
    """Make the gradients of the chosen steps, counted from 1, NaN."""
    honest, calls = FsdpEngine.inspect, iter(range(1, 1000))

    def broken(engine: FsdpEngine, loss: Tensor) -> None:
        if which(next(calls)):
            for parameter in engine.model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(math.nan)
        honest(engine, loss)

    monkeypatch.setattr(FsdpEngine, "inspect", broken)


@pytest.fixture(params=["results at once", "results one step late"])
def _results(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they are read one step late."""
    monkeypatch.setattr(results, "reads_late", lambda _: "late" in request.param)


@pytest.mark.usefixtures("_results")
def test_skipped_steps_are_counted_and_leave_the_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("train.steps=8", "checkpoint.interval=2", "checkpoint.keep_latest_k=9")
    with monkeypatch.context() as patch:
        spoil(patch, {3, 4, 8}.__contains__)
        mlm_train(*words(data, tmp_path / "run", *steps))
    run = tmp_path / "run"
    assert saved(run) == [2, 6, 8]
    progress = open_checkpoint(run / "checkpoints" / "step-00000008").progress.model_dump()
    assert (progress["skipped"], progress["optimizer_steps"], progress["samples"]) == (3, 5, 64)
    assert list(scalars(run, "train/skipped_steps").values()) == [0, 0, 1, 2, 2, 2, 2, 3]
    log = (run / "train.log").read_text()
    assert "step 4 SKIPPED, weights unchanged (2 skipped so far): non-finite gradient; gradient of " in log
    assert json.loads((run / "heartbeat.json").read_text())["state"] == "finished"


@pytest.mark.usefixtures("_results")
def test_too_many_in_a_row_end_the_run_which_then_goes_on_from_the_last_good_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("train.steps=8", "checkpoint.interval=1", "checkpoint.keep_latest_k=1")
    mlm_train(*words(data, tmp_path / "unbroken", *steps))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, lambda step: step >= 5)
        mlm_train_ends_with_two(*words(data, run, *steps))
    assert saved(run) == [4]
    beat = json.loads((run / "heartbeat.json").read_text())
    assert (beat["state"], beat["step"], beat["skipped"]) == ("ended", 7, 3)
    mlm_train(*words(data, run, *steps))
    same_losses(run, tmp_path / "unbroken", tolerance=0.0)


def mlm_train_ends_with_two(*command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(command))
    assert end.value.code == 2
    runtime.stop()


def bad_labels(monkeypatch: pytest.MonkeyPatch, *cursors: int) -> None:
    """Give the steps that start with these samples useless labels."""
    honest = loop.step_batches

    def broken(samples: Any, cursor: int, *arguments: Any) -> list[MicroBatch]:
        batches = honest(samples, cursor, *arguments)
        if cursor not in cursors:
            return batches
        return [MicroBatch(ids, torch.full_like(labels, 511)) for ids, labels in batches]

    monkeypatch.setattr(loop, "step_batches", broken)


SPIKE = (
    "train.steps=24", "checkpoint.interval=10", "checkpoint.keep_latest_k=9", "optimizer.lr=3e-3",
    "train.spike={window: 5, sigmas: 4, skip_steps: 2, max_rollbacks: 1}",
)  # fmt: skip


@pytest.mark.usefixtures("_results")
def test_a_spike_takes_the_run_back_and_past_its_samples(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    with monkeypatch.context() as patch:
        bad_labels(patch, 15 * 8)  # step 16
        mlm_train(*words(data, run, *SPIKE))
    log = (run / "train.log").read_text()
    assert (
        "loss spike at step 16: rolled back to step-00000010 (rollback 1), continuing with sample 144" in log
    )
    progress = open_checkpoint(run / "checkpoints" / "step-00000024").progress.model_dump()
    assert (progress["rollbacks"], progress["samples"]) == (1, 144 + 14 * 8)
    # The same by hand: resume from that checkpoint with later samples.
    mlm_train(*words(data, other, *SPIKE, "train.stop_after=10"))
    folder = other / "checkpoints" / "step-00000010"
    manifest = open_checkpoint(folder).model_dump()
    manifest["progress"]["samples"] = 144
    write_manifest(folder, manifest)
    mlm_train(*words(data, other, *SPIKE))
    same_losses(run, other, tolerance=0.0)


def test_the_spike_after_the_last_rollback_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    bad_labels(monkeypatch, 15 * 8, 144 + 8 * 8)
    mlm_train_ends_with_two(*words(data, run, *SPIKE))
    assert saved(run) == [10]
    assert "loss spike at step 19" not in (run / "train.log").read_text()
