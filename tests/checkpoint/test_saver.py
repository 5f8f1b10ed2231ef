"""Background saves: the same files, nothing of later steps, and failed saves are survived."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlm_train.checkpoint import save as saving
from mlm_train.checkpoint import saver as saver_module
from mlm_train.checkpoint.index import read_index
from mlm_train.checkpoint.load import open_checkpoint
from mlm_train.checkpoint.reading.slices import read_tensor
from mlm_train.checkpoint.save import Snapshot, take_snapshot, write_checkpoint
from mlm_train.config import Config, load_config
from mlm_train.errors import UserError
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.runtime import Runtime
from mlm_train.train.batches import step_batches
from mlm_train.train.loop import save, train
from mlm_train.train.preflight import preflight
from mlm_train.train.setup import Run, opened_run
from mlm_train.utils.records import FileRecord
from tests.commands import TINY, mlm_train, refused

CONFIG = "configs/micro.yaml"


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A run that fails in this process must not disturb the next."""
    yield
    processes.stop()


def words(data: Path, run: Path, *more: str) -> list[str]:
    return [
        *TINY,
        f"data.path={data}",
        f"train.output={run}",
        "train.steps=4",
        "checkpoint.interval=1",
        *more,
    ]


def config_of(data: Path, run: Path, *more: str) -> Config:
    return load_config(CONFIG, words(data, run, *more))


def checksums(run: Path) -> dict[str, list[FileRecord]]:
    """Checkpoint name -> its manifest's files; all contents are verified."""
    return {folder.name: open_checkpoint(folder).files for folder in (run / "checkpoints").glob("step-*")}


def step(run: Run) -> None:
    """Train on one batch."""
    train = run.config.train
    run.trainer.step(
        step_batches(run.samples, 0, train.global_batch_size, train.micro_batch_size, run.runtime.topology),
        1e-3,
    )


def test_written_in_the_background_or_not_the_files_are_the_same(data: Path, tmp_path: Path) -> None:
    for name, background in (("one", "true"), ("other", "false")):
        more = (f"checkpoint.async_save={background}", "checkpoint.keep_latest_k=9")
        mlm_train("pretrain", CONFIG, *words(data, tmp_path / name, *more))
    assert sorted(checksums(tmp_path / "one")) == sorted(checksums(tmp_path / "other"))
    one, other = (
        sorted((tmp_path / name).glob("checkpoints/step-*/*.safetensors")) for name in ("one", "other")
    )
    assert len(one) == len(other) == 4
    for first, second in zip(map(load_file, one), map(load_file, other), strict=True):
        assert first.keys() == second.keys() and "weight/lm_head.weight" in first
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_goes_on_and_leaves_no_trace_in_the_copy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()

    def late(root: Path, snapshot: Snapshot, runtime: Runtime) -> Path:
        assert may_write.wait(60)
        return write_checkpoint(root, snapshot, runtime)

    monkeypatch.setattr(saver_module, "write_checkpoint", late)
    config = config_of(data, tmp_path / "run")
    with opened_run(config, preflight(config, 1, 1)) as run:
        step(run)
        progress = run.progress.after(8, 32)
        expected = take_snapshot(run.trainer.engine, run.runtime, config, progress.as_dict(), {})
        save(run, progress)
        for _ in range(2):  # nothing is on disk yet
            step(run)
            run.saver.poll()
        assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
        may_write.set()
        run.saver.finish()
        later = take_snapshot(run.trainer.engine, run.runtime, config, progress.as_dict(), {})
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    index = read_index(folder, open_checkpoint(folder).files)
    found = {name: read_tensor(index, name) for name in index.tensors}
    assert found.keys() == {part.name for part in expected.state}
    assert all(torch.equal(found[part.name], part.tensor) for part in expected.state)
    assert any(not torch.equal(found[part.name], part.tensor) for part in later.state)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step-00000001 committed in" in log and "training blocked for" in log


def test_a_save_may_fail_and_the_next_one_succeed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_in_the_middle(root: Path, snapshot: Snapshot, runtime: Runtime) -> Path:
        if snapshot.step in (2, 3):
            raise UserError(f"step {snapshot.step} cannot be written")
        return write_checkpoint(root, snapshot, runtime)

    monkeypatch.setattr(saver_module, "write_checkpoint", fails_in_the_middle)
    mlm_train("pretrain", CONFIG, *words(data, tmp_path / "run"))
    log = (tmp_path / "run" / "train.log").read_text()
    for number in (2, 3):
        assert f"NOT saved: step {number} cannot be written | the last good one is step-00000001" in log
    assert sorted(checksums(tmp_path / "run")) == ["step-00000001", "step-00000004"]


def test_a_run_ends_where_nothing_can_be_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(root: Path, snapshot: Snapshot, runtime: Runtime) -> Path:
        if snapshot.step > 1:
            raise UserError(f"step {snapshot.step} cannot be written")
        return write_checkpoint(root, snapshot, runtime)

    monkeypatch.setattr(saver_module, "write_checkpoint", fails)
    config = config_of(data, tmp_path / "run", "train.steps=9")
    with (
        pytest.raises(UserError, match="step 4 cannot be written"),
        opened_run(config, preflight(config, 1, 1)) as run,
    ):
        train(run)
    assert sorted(checksums(tmp_path / "run")) == ["step-00000001"]


def test_space_is_looked_for_before_anything_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = saving.shutil.disk_usage
    run = tmp_path / "run"
    mlm_train("pretrain", CONFIG, *words(data, run, "train.steps=2"))
    before = checksums(run)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage(path)._replace(free=100_000))
    processes.stop()
    more = ("train.steps=3", "monitor.writers=[]")
    config = config_of(data, run, *more)
    with (
        pytest.raises(UserError, match=r"the checkpoint of step 3 needs .* GiB, but .* free: free space"),
        opened_run(config, preflight(config, 1, 1)) as opened,
    ):
        train(opened)
    assert checksums(run) == before and not list((run / "checkpoints").glob(".partial-*"))


def test_list_verify_and_prune(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    mlm_train("pretrain", CONFIG, *words(data, run, "checkpoint.keep_latest_k=9"))
    capsys.readouterr()
    mlm_train("checkpoint", "list", run)
    listed = capsys.readouterr().out
    assert listed.count("1 ranks, TP1 PP1 fsdp") == listed.count("yes") == 4 and " 1,024 " in listed
    mlm_train("checkpoint", "verify", run)
    assert capsys.readouterr().out.count("whole") == 4
    file = next((run / "checkpoints" / "step-00000002").glob("*.safetensors"))
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    assert "checksum differs" in refused("checkpoint", "verify", run)
    assert "checksum differs" in refused("checkpoint", "verify", run / "checkpoints" / "step-00000002")
    mlm_train("checkpoint", "prune", run, "--keep-latest-k", 2, "--dry-run")
    assert (
        capsys.readouterr().out.count("would delete") == 2 and len(list(run.glob("checkpoints/step-*"))) == 4
    )
    assert "--keep-latest-k 0" in refused("checkpoint", "prune", run, "--keep-latest-k", 0)
    mlm_train("checkpoint", "prune", run, "--keep-latest-k", 2)
    assert sorted(checksums(run)) == ["step-00000003", "step-00000004"]
    assert "holds no checkpoint" in refused("checkpoint", "list", tmp_path)
    newest = next((run / "checkpoints" / "step-00000004").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert "bytes instead of" in refused("checkpoint", "prune", run, "--keep-latest-k", 1)
    assert len(list(run.glob("checkpoints/step-*"))) == 2


def test_a_state_that_is_not_finite_pushes_no_good_one_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data, tmp_path / "run", "checkpoint.keep_latest_k=1")
    with opened_run(config, preflight(config, 1, 1)) as run:
        run.saver.save({"step": 1, "samples": 8, "tokens": 256})
        run.saver.finish()
        weight = next(iter(run.trainer.engine.model.parameters()))
        with torch.no_grad():
            weight.view(-1)[3] = torch.nan
        run.saver.save({"step": 2, "samples": 16, "tokens": 512})
        with pytest.raises(UserError, match="the state after step 2 holds infinity or NaN in weight/"):
            run.saver.finish()
    assert list(checksums(tmp_path / "run")) == ["step-00000001"]
