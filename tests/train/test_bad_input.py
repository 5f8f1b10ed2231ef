"""Every mistake a user can make before or at the start of training: one line, exit 2, nothing lost."""

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlm_train.parallel import runtime
from tests.commands import ROOT, TINY, mlm_train, refused, start

CONFIG = "configs/micro.yaml"


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A refused run in this process must not disturb the next."""
    yield
    runtime.stop()


def pretrain(data: Path, output: Path, *more: str) -> list[str]:
    return [
        "pretrain", CONFIG, *TINY, f"data.path={data}", f"train.output={output}", "train.steps=2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with two checkpoints."""
    run = tmp_path_factory.mktemp("trained") / "run"
    mlm_train(*pretrain(data, run, "checkpoint.every=1"))
    runtime.stop()
    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_world_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    line = refused("launch", "--nproc", 3, *pretrain(data, tmp_path / "run")[1:])
    assert "train.global_batch=8" in line and "the nearest is 6" in line
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    line = refused(*pretrain(data, tmp_path / "run", "train.compile=true"))
    assert "train.compile=True: needs a C++ compiler, and a-compiler-that-is-not-there is not" in line
    assert not (tmp_path / "run").exists()


def test_data_that_is_missing_or_truncated(data: Path, tmp_path: Path) -> None:
    assert "holds no prepared data" in refused(*pretrain(tmp_path / "nowhere", tmp_path / "run"))
    for name in ("train.bin", "validation.idx"):
        broken = Path(shutil.copytree(data, tmp_path / f"broken-{name}"))
        contents = (broken / name).read_bytes()
        (broken / name).write_bytes(contents[:-2])
        line = refused(*pretrain(broken, tmp_path / "run"))
        assert name in line and f"{len(contents) - 2} bytes instead of {len(contents)}" in line
        (broken / name).unlink()
        assert f"{name} is missing" in refused(*pretrain(broken, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_tokenizer_that_is_not_the_datas(data: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    with (broken / "tokenizer.model").open("ab") as file:
        file.write(b"x")
    assert "tokenizer.model was changed" in refused(*pretrain(broken, tmp_path / "run"))


def test_vocabulary_and_window_that_do_not_fit_the_data(data: Path, tmp_path: Path) -> None:
    assert "model.vocab_size=512" in refused(*pretrain(data, tmp_path / "run", "model.vocab_size=511"))
    long = ("data.sequence_length=10000000", "model.max_position_embeddings=10000000")
    assert "less than one sample" in refused(*pretrain(data, tmp_path / "run", *long))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_size=64", "model.head_dim is 8 there and 16 here"),
        ("train.seed=7", "train.seed=7 but checkpoint"),
        ("data.sequence_length=16", "data.sequence_length=16 but checkpoint"),
    ],
)
def test_checkpoint_of_another_run(trained: Path, data: Path, override: str, words: str) -> None:
    before = snapshot(trained)
    assert words in refused(*pretrain(data, trained, override, "train.steps=4"))
    assert snapshot(trained) == before


def test_checkpoint_of_other_data(trained: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    mlm_train("data", "prepare", "--input", corpus, "--output", other, "--tokenizer", "train:400")
    assert "fingerprints differ" in refused(*pretrain(other, trained, "train.steps=4"))


def test_output_folders_that_are_no_runs(trained: Path, data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("mine")
    for folder in (mine, data):
        before = snapshot(folder)
        assert "holds other files" in refused(*pretrain(data, folder))
        assert snapshot(folder) == before
    assert "cannot be written" in refused(*pretrain(data, Path("/proc/run")))
    assert "is at step 2" in refused(*pretrain(data, trained, "train.steps=1", "schedule.warmup_steps=0"))


def test_folders_that_people_and_kills_leave_do_no_harm(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000002.good")
    (checkpoints / "step-00000003").mkdir()  # a deletion or a save, killed half way
    (checkpoints / "step-00000003" / "shard-00001").write_bytes(b"x")
    (checkpoints / ".partial-step-00000009").mkdir()
    mlm_train(*pretrain(data, run, "train.steps=3"))
    runtime.stop()
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest", "step-00000002", "step-00000002.good", "step-00000003"]
    mlm_train("export", run, "--output", tmp_path / "export")


def test_divergence_ends_the_run_and_keeps_the_checkpoints(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    before = snapshot(run / "checkpoints")
    wild = ("optimizer.lr=1e30", "schedule.warmup_steps=0", "train.steps=9", "checkpoint.every=1")
    command = [sys.executable, "-m", "mlm_train", *pretrain(data, run, *wild)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "diverged" in done.stderr.splitlines()[-1]
    assert "changed since that checkpoint: optimizer.lr" in done.stderr
    kept = snapshot(run / "checkpoints")
    assert {name: kept.get(name) for name in before if "00000002" in name} == {
        name: contents for name, contents in before.items() if "00000002" in name
    }


def test_a_disk_that_takes_no_more_keeps_what_is_committed(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    before = snapshot(run / "checkpoints")

    def small_files() -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, 100_000)
        )  # a write beyond fails as on a full disk

    command = [sys.executable, "-m", "mlm_train", *pretrain(data, run, "train.steps=4")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert snapshot(run / "checkpoints") == before
    mlm_train(*pretrain(data, run, "train.steps=4"))
    assert (run / "checkpoints" / "step-00000004").is_dir()


def test_two_runs_on_one_folder(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(*pretrain(data, run, "train.steps=2000", "checkpoint.every=0"))
    try:
        while not (run / "config.yaml").is_file():
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.05)
        before = (run / "config.yaml").read_bytes()
        assert "being trained by another process" in refused(*pretrain(data, run, "optimizer.lr=0.5"))
        assert (run / "config.yaml").read_bytes() == before and first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_a_terminated_launch_leaves_no_rank_behind(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = start("launch", "--nproc", 2, *pretrain(data, run, "train.steps=2000")[1:])
    while not (run / "config.yaml").is_file():
        assert launch.poll() is None, launch.communicate()[0]
        time.sleep(0.05)
    ranks = psutil.Process(launch.pid).children(recursive=True)
    launch.terminate()
    output, _ = launch.communicate(timeout=90)
    assert launch.returncode == 128 + 15 and "ended by SIGTERM" in output
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive


def test_output_that_exists_without_resume(trained: Path, data: Path, tmp_path: Path) -> None:
    before = snapshot(trained)
    assert "nothing is overwritten" in refused(*pretrain(data, trained, "checkpoint.resume=false"))
    assert snapshot(trained) == before
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(*pretrain(data, tmp_path / "file"))


def damaged(run: Path, how: str) -> str:
    """Damage the newest checkpoint's largest file; its name."""
    folder = run / "checkpoints" / "step-00000002"
    victim = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    contents = bytearray(victim.read_bytes())
    if how == "flipped":
        contents[len(contents) // 2] ^= 1
        victim.write_bytes(contents)
    elif how == "truncated":
        victim.write_bytes(contents[: len(contents) // 2])
    else:
        victim.unlink()
    return victim.name


@pytest.mark.parametrize(
    ("how", "words"),
    [("flipped", "checksum differs"), ("truncated", "bytes instead of"), ("deleted", "is missing")],
)
def test_damaged_checkpoint(trained: Path, data: Path, tmp_path: Path, how: str, words: str) -> None:
    run = copy_of(trained, tmp_path)
    name = damaged(run, how)
    for command in (pretrain(data, run, "train.steps=4"), ["export", run, "--output", tmp_path / "export"]):
        line = refused(*command)
        assert words in line and name in line and "step-00000002" in line
        runtime.stop()
    assert not (tmp_path / "export").exists()
    # The fix that the line names: fall back to the older checkpoint.
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    mlm_train(*pretrain(data, run, "train.steps=4"))
    assert (run / "checkpoints" / "step-00000004").is_dir()


def test_ranks_that_find_damage_end_the_launch_with_one_line(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    damaged(run, "flipped")
    launch = start("launch", "--nproc", 2, *pretrain(data, run, "train.steps=4")[1:])
    output, _ = launch.communicate(timeout=120)
    assert launch.returncode == 2, output
    lines = [line for line in output.splitlines() if line.startswith("mlm-train: ")]
    assert len(lines) == 1 and "checksum differs" in lines[0] and "Traceback" not in output


def test_manifest_that_points_outside_is_refused(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["file"] = "../step-00000001/manifest.json"
    path.write_text(json.dumps(manifest))
    assert "not a file of that folder" in refused(*pretrain(data, run, "train.steps=4"))
    path.write_text("{")
    assert "damaged" in refused(*pretrain(data, run, "train.steps=4"))


def test_export_and_evaluate_refuse(trained: Path, data: Path, corpus: Path, tmp_path: Path) -> None:
    assert "holds no checkpoint" in refused("export", tmp_path, "--output", tmp_path / "new")
    export = tmp_path / "export"
    mlm_train("export", trained, "--output", export)
    before = snapshot(export)
    refused("export", trained, "--output", export)
    assert snapshot(export) == before
    other = tmp_path / "other"
    mlm_train("data", "prepare", "--input", corpus, "--output", other, "--tokenizer", "train:500")
    assert "not the tokenizer" in refused("evaluate", "--model", export, "--data", other)
    assert "give either" in refused("evaluate", "--model", export)
    assert "does not exist" in refused("pretrain", tmp_path / "no.yaml")


def test_warm_start_takes_the_weights_alone(trained: Path, data: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    mlm_train("export", trained, "--output", export)
    for number, origin in enumerate((trained, export)):
        run = tmp_path / f"warm-{number}"
        # No step is large enough to move the weights: what comes out is what went in.
        still = ("optimizer.lr=1e-30", "schedule.warmup_steps=0", "schedule.min_lr=0", "train.steps=1")
        mlm_train(*pretrain(data, run, f"checkpoint.warm_start={origin}", *still))
        runtime.stop()
        again = tmp_path / f"again-{number}"
        mlm_train("export", run, "--output", again)
        assert (again / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    assert "another model" in refused(
        *pretrain(data, tmp_path / "no", f"checkpoint.warm_start={trained}", "model.intermediate_size=32")
    )
    assert "holds no checkpoint" in refused(
        *pretrain(data, tmp_path / "no", f"checkpoint.warm_start={tmp_path / 'nowhere'}")
    )
