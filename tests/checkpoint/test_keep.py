"""Checkpoints kept on purpose: those at certain steps, and the best by validation loss."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlm_train.checkpoint import folders as folders_module
from mlm_train.checkpoint.folders import commit, committed, delete, step_folder
from mlm_train.checkpoint.keep import Keep
from mlm_train.checkpoint.manifest import MANIFEST
from mlm_train.parallel import runtime
from mlm_train.utils.files import write_text
from tests.commands import TINY, mlm_train, refused, scalars
from tests.train.short_runs import snapshot

CONFIG, STEPS = "configs/micro.yaml", 10
WILD, CALM = ("optimizer.lr=3", f"schedule.warmup_steps={STEPS}"), "optimizer.lr=0.1"
KEEP = ("checkpoint.keep_latest_k=1", "checkpoint.keep_interval=4", "checkpoint.keep_best_k=2")


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A refused run in this process must not disturb the next."""
    yield
    runtime.stop()


def pretrain(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "pretrain", CONFIG, *TINY, f"data.path={data}", f"train.output={run}", f"train.steps={STEPS}",
        "checkpoint.interval=1", "train.eval_interval=1", "memory.mode=unique", "monitor.peak_tflops=1",
        *WILD, *KEEP, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two launches: the loss falls in the first one and rises in the second."""
    run = tmp_path_factory.mktemp("kept") / "run"
    for more in ((CALM, "train.stop_after=6"), ()):
        mlm_train(*pretrain(data, run, *more))
        runtime.stop()
    return run


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy of the run that tests may change."""
    return Path(shutil.copytree(done, tmp_path / "copy"))


def steps(run: Path) -> list[int]:
    """Steps of the existing checkpoints."""
    return [int(folder.name.removeprefix("step-")) for folder in committed(run / "checkpoints")]


def best(run: Path) -> list[int]:
    """All steps sorted by their validation loss in TensorBoard."""
    losses = scalars(run, "validation/loss")
    assert len(losses) == STEPS
    return sorted(losses, key=lambda step: losses[step])


def listed(run: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    mlm_train("checkpoint", "list", run, "--json")
    return json.loads(capsys.readouterr().out)


def test_the_best_and_those_of_certain_steps_outlive_the_newest(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = best(done)[:2]
    assert max(first, second) < 8 and 4 not in (first, second), "the loss was to rise again"
    assert steps(done) == sorted({first, second, 4, 8, STEPS})
    folder = done / "checkpoints"
    assert (folder / "best").read_text() == f"step-{first:08d}\n"
    losses = scalars(done, "validation/loss")
    rows = {row["step"]: row for row in listed(done, capsys)}
    for step, row in rows.items():
        assert row["validation_loss"] == pytest.approx(losses[step], rel=1e-6), "of its own weights"
        assert ("best" in row["kept"]) == (step == first)
        assert ("best 2" in row["kept"]) == (step == second)
        assert ("newest" in row["kept"]) == (step == STEPS)
        assert ("every 4" in row["kept"]) == (step % 4 == 0)
    mlm_train("checkpoint", "list", done)
    table = capsys.readouterr().out
    assert "best 2" in table and "every 4" in table and f"{losses[first]:.4f}" in table


def test_best_names_a_checkpoint(
    done: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every command that takes a model; its weights have that loss."""
    first = best(done)[0]
    found = []
    for name in (f"step-{first:08d}", "best"):
        capsys.readouterr()
        few = ("--data", data, "--sequence-length", 32, "--samples", 9, "--json")
        mlm_train("evaluate", "--model", done / "checkpoints" / name, *few)
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    for number, source in enumerate((done / "best", done / "checkpoints" / "best", done / "latest")):
        mlm_train("export", source, "--output", tmp_path / f"export-{number}")
        step = STEPS if source.name == "latest" else first
        assert f"step-{step:08d}" in capsys.readouterr().out
    one, other = (tmp_path / f"export-{number}" / "model.safetensors" for number in range(2))
    assert one.read_bytes() == other.read_bytes()
    warm = (f"checkpoint.warm_start={done / 'best'}", "train.steps=1", "schedule.warmup_steps=0")
    mlm_train(*pretrain(data, tmp_path / "warm", *warm, "optimizer.lr=1e-30", "schedule.min_lr=0"))
    mine = scalars(done, "validation/loss")[first]
    assert scalars(tmp_path / "warm", "validation/loss")[1] == pytest.approx(mine, rel=1e-5)
    mlm_train("checkpoint", "verify", done / "best")
    assert f"step-{first:08d}: whole" in capsys.readouterr().out


def test_best_of_none(run: Path, data: Path, tmp_path: Path) -> None:
    """No loss was measured, or `best` is something else."""
    bare = tmp_path / "bare"
    none = ("checkpoint.keep_best_k=0", "checkpoint.keep_interval=0", "train.eval_interval=0")
    mlm_train(*pretrain(data, bare, *none, "train.stop_after=2"))
    assert not (bare / "checkpoints" / "best").exists()
    assert "validation loss" in refused("export", bare / "best", "--output", tmp_path / "export")
    assert "validation loss" in refused("evaluate", "--model", bare / "best", "--data", data)
    (tmp_path / "best").write_text("step-00000001\n")
    assert str(tmp_path) in refused("export", tmp_path / "best", "--output", tmp_path / "export")
    (run / "checkpoints" / "best").write_text("../../elsewhere\n")  # it is for people: no code reads it
    mlm_train("export", run / "best", "--output", tmp_path / "export")


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.keep_interval=3 checkpoint.interval=2",
        "checkpoint.keep_interval=3 checkpoint.interval=0",
        "checkpoint.keep_best_k=1 train.eval_interval=0",
        "checkpoint.keep_best_k=1 train.eval_interval=2",
        "checkpoint.keep_best_k=1 checkpoint.interval=0",
        "checkpoint.keep_best_k=-1",
        "checkpoint.keep_interval=-1",
    ],
)
def test_what_could_keep_nothing_is_refused(data: Path, tmp_path: Path, override: str) -> None:
    off = ("checkpoint.keep_interval=0", "checkpoint.keep_best_k=0")
    line = refused(*pretrain(data, tmp_path / "run", *off, *override.split()))
    assert override.partition("=")[0] in line and not (tmp_path / "run").exists()


def test_prune_keeps_them_too_and_says_so(done: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = steps(run)
    capsys.readouterr()
    mlm_train("checkpoint", "prune", run, "--keep-latest-k", 1)
    said = capsys.readouterr().out
    assert steps(run) == before and "every 4" in said and "best" in said
    first, second = best(run)[:2]
    mlm_train("checkpoint", "prune", run, "--keep-interval", 0, "--dry-run")
    said = capsys.readouterr().out
    gone = [step for step in (4, 8) if step not in (first, second)]
    assert steps(run) == before and said.count("would delete") == len(gone)
    mlm_train("checkpoint", "prune", run, "--keep-interval", 0, "--keep-best-k", 1)
    assert steps(run) == [first, STEPS]
    mlm_train("checkpoint", "prune", run, "--keep-interval", 0, "--keep-best-k", 0)
    assert steps(run) == [STEPS] and not (run / "checkpoints" / "best").exists()
    for option in ("--keep-interval", "--keep-best-k"):
        assert option in refused("checkpoint", "prune", run, option, -1)


def test_a_start_that_would_delete_what_was_kept_is_refused(run: Path, data: Path) -> None:
    before, files = steps(run), snapshot(run)
    first = best(run)[0]
    more = (f"train.steps={STEPS + 2}", f"schedule.total_steps={STEPS}")
    for forgotten in ("checkpoint.keep_interval=0", "checkpoint.keep_best_k=0", "checkpoint.keep_best_k=1"):
        line = refused(*pretrain(data, run, *more, forgotten))
        assert forgotten.partition("=")[0] in line and "checkpoint prune" in line
    assert snapshot(run) == files
    command = line.partition("`mlm-train ")[2].partition("`")[0]
    mlm_train(*command.split())
    assert steps(run) == sorted({first, 4, 8, STEPS}) and len(steps(run)) < len(before)
    mlm_train(*pretrain(data, run, *more, "checkpoint.keep_best_k=1"))
    assert first in steps(run) and steps(run)[-1] == STEPS + 2


def test_losses_of_other_samples_are_not_compared(run: Path, data: Path) -> None:
    """With more validation samples losses are not comparable: the best of each kind is kept."""
    first, second = best(run)[:2]
    more = (f"train.steps={STEPS + 3}", f"schedule.total_steps={STEPS}", "train.eval_samples=12")
    mlm_train(
        *pretrain(data, run, *more, "checkpoint.keep_interval=0", "checkpoint.keep_best_k=2", *KEEP[1:])
    )
    kept = steps(run)
    assert {first, second} < set(kept)
    losses = {step: loss for step, loss in scalars(run, "validation/loss").items() if step > STEPS}
    assert set(sorted(losses, key=lambda step: losses[step])[:2]) < set(kept)
    lowest = min(losses, key=lambda step: losses[step])
    assert (run / "checkpoints" / "best").read_text() == f"step-{lowest:08d}\n"


def test_a_loss_belongs_to_the_weights_it_was_measured_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved at every step, evaluated at every second one: checkpoints without a loss are never the best."""
    run = tmp_path / "run"
    off = ("checkpoint.keep_best_k=0", "checkpoint.keep_interval=0", "checkpoint.keep_latest_k=9")
    mlm_train(*pretrain(data, run, *off, "train.eval_interval=2", "train.stop_after=5"))
    losses = scalars(run, "validation/loss")
    assert list(losses) == [2, 4]
    found = {row["step"]: row["validation_loss"] for row in listed(run, capsys)}
    assert [found[step] for step in (1, 3, 5)] == [None] * 3
    assert [found[step] for step in (2, 4)] == pytest.approx(list(losses.values()), rel=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_no_name_is_that_of_a_deleted_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """`latest` is written before older checkpoints are deleted, or is gone where the disk had no space."""
    deleted, latest = list[str](), tmp_path / "latest"

    def deleting(folder: Path) -> None:
        assert not latest.exists() if full else latest.read_text() != f"{folder.name}\n"
        deleted.append(folder.name)
        delete(folder)

    def writing(path: Path, text: str) -> None:
        if full and len(committed(tmp_path)) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr(folders_module, "delete", deleting)
    monkeypatch.setattr(folders_module, "write_text", writing)
    for step in (1, 2, 3):
        partial = tmp_path / f".partial-{step}"
        partial.mkdir()
        (partial / MANIFEST).touch()
        commit(partial, step_folder(tmp_path, step), Keep(1))
        assert latest.read_text() == f"step-{step:08d}\n"
    assert deleted == ["step-00000001", "step-00000002"]
