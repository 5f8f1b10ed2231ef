"""Every mistake a user can make before or at the start of training: one line, exit 2, nothing lost."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from mlm_train.checkpoint.manifest import SEAL, write_manifest
from mlm_train.config import load_config
from mlm_train.data.blend import Blend
from mlm_train.parallel import runtime
from mlm_train.train.preflight import find_checkpoint
from tests.commands import ROOT, TINY, listening, mlm_train, refused, scalars, start

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


def test_no_gpu_where_one_is_asked_for(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = pretrain(data, tmp_path / "run")
    for command in (run, ["launch", "--nproc", "1", *run[1:]]):
        assert "torch finds no CUDA device here; set train.device=cpu" in refused(
            *command, "train.device=cuda"
        )
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert "was given 8 GPUs here and torch finds none" in refused(*run, "train.device=auto")
    assert not (tmp_path / "run").exists()


def test_a_rendezvous_that_cannot_be(data: Path, tmp_path: Path) -> None:
    launch = ("launch", "--nproc", 1, "--nodes", 2, *pretrain(data, tmp_path / "run")[1:])
    with socket.create_server(("127.0.0.1", 0)) as stale:  # it would never answer
        endpoint = f"localhost:{stale.getsockname()[1]}"
        line = refused(*launch, "--rendezvous", endpoint)
    assert f"--rendezvous {endpoint}: that port of this machine cannot be used (taken by" in line
    assert f"process {os.getpid()}); give another one, the same on every machine" in line
    for wrong in ("node1", "node1:port", "node1:70000"):
        assert f"--rendezvous {wrong}: give HOST:PORT" in refused(*launch, "--rendezvous", wrong)
    assert not (tmp_path / "run").exists()


REFUSALS = """
import json, sys
from tests.commands import refused
print(json.dumps([refused(*words) for words in json.load(sys.stdin)]))
"""


def test_places_without_rights(data: Path, trained: Path, tmp_path: Path) -> None:
    """As a user whom the rights of files bind; root is made one by taking two capabilities."""
    copy, closed = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "closed"
    run = copy_of(trained, tmp_path)
    closed.mkdir()
    config = tmp_path / "config.yaml"
    config.write_text((ROOT / CONFIG).read_text())
    (tmp_path / "file").write_text("mine")
    cases = [
        (copy / "train.bin", pretrain(copy, tmp_path / "new"), f"{copy}/train.bin: Permission denied"),
        (copy / "manifest.json", pretrain(copy, tmp_path / "new"), "manifest.json cannot be read"),
        (closed, pretrain(data, closed), f"{closed}: Permission denied"),
        (closed, pretrain(data, closed / "inner" / "run"), "Permission denied"),
        (run / "checkpoints", pretrain(data, run, "train.steps=4"), f"{run}/checkpoints: Permission denied"),
        (config, ["pretrain", str(config)], f"config {config} cannot be read"),
        (None, pretrain(data, tmp_path / "file" / "run"), "Not a directory"),
        (None, pretrain(tmp_path / "file" / "data", tmp_path / "new"), "Not a directory"),
    ]
    before = snapshot(run)
    places = {place for place, _, _ in cases if place is not None}
    rights = {place: place.stat().st_mode for place in places}
    for place in places - {copy / "manifest.json"}:
        place.chmod(0)
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [*drop, sys.executable, "-c", REFUSALS]
    lines: list[str] = []
    for group in (cases[:1], cases[1:]):
        (copy / "manifest.json").chmod(0 if group != cases[:1] else 0o644)
        done = subprocess.run(
            command, cwd=ROOT, input=json.dumps([words for _, words, _ in group]), text=True,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines += json.loads(done.stdout)
    for place, mode in rights.items():
        place.chmod(mode)
    assert [words for (_, _, words), line in zip(cases, lines, strict=True) if words not in line] == [], lines
    assert snapshot(run) == before and not (tmp_path / "new").exists()


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


def test_checkpoint_of_other_data(trained: Path, data: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    mlm_train("data", "prepare", "--input", corpus, "--output", other, "--tokenizer", "train:400")
    before = snapshot(trained)
    line = refused(*pretrain(other, trained, "train.steps=4"))
    assert "fingerprints differ" in line and snapshot(trained) == before
    wrong = "checkpoint.accept_data=sha256:0123456789ab"
    assert refused(*pretrain(other, trained, "train.steps=4", wrong)) == line
    assert "should match pattern" in refused(*pretrain(other, trained, "checkpoint.accept_data=abcdef"))
    # The line says what to add; the checkpoints that follow are of the new data.
    run = copy_of(trained, tmp_path)
    accept = line.split()[-1]
    mlm_train(*pretrain(other, run, "train.steps=3", accept))
    runtime.stop()
    mlm_train(*pretrain(other, run, "train.steps=4"))
    assert (
        json.loads((run / "checkpoints/step-00000004/manifest.json").read_text())["progress"]["samples"] == 32
    )
    runtime.stop()
    assert "fingerprints differ" in refused(*pretrain(data, run, "train.steps=5"))


def test_checkpoint_of_another_order(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["data"]["order"], manifest[SEAL]
    write_manifest(path.parent, manifest)
    before = snapshot(run)
    line = refused(*pretrain(data, run, "train.steps=4"))
    assert "with another order of samples" in line and snapshot(run) == before


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
    assert names == [
        "damaged-step-00000003", "latest", "step-00000002", "step-00000002.good", "step-00000003"
    ]  # fmt: skip
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
    assert listening(psutil.Process(launch.pid)) == {"127.0.0.1"}
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
    before = snapshot(run)
    strict = pretrain(data, run, "train.steps=4", "checkpoint.fall_back=false")
    for command in (strict, ["export", run, "--output", tmp_path / "export"]):
        line = refused(*command)
        assert words in line and name in line and "delete" in line and "step-00000002" in line
        runtime.stop()
    assert not (tmp_path / "export").exists()
    assert {key: snapshot(run)[key] for key in before if key.startswith("checkpoints/step")} == {
        key: contents for key, contents in before.items() if key.startswith("checkpoints/step")
    }
    mlm_train(*pretrain(data, run, "train.steps=4"))
    log = (run / "train.log").read_text()
    (line,) = re.findall(
        r" checkpoint step-00000002 is damaged \((.*)\): kept as damaged-step-00000002; .*", log
    )
    assert words in line and name in line and "checkpoints/step-00000001 at step 1" in log
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"damaged-step-00000002", "latest", "step-00000001", "step-00000004"}
    assert scalars(run, "train/loss").keys() == {1, 2, 3, 4}


@pytest.mark.parametrize("seal", [True, False], ids=["digit", "no checksum"])
def test_a_changed_manifest_is_damage(trained: Path, data: Path, tmp_path: Path, seal: bool) -> None:
    """One digit of it would be another place in the data."""
    run = copy_of(trained, tmp_path)
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    if seal:
        manifest["progress"]["samples"] += 1
    else:
        del manifest[SEAL]
    path.write_text(json.dumps(manifest))
    assert "manifest.json is damaged: its checksum differs" in refused("checkpoint", "verify", run)
    config = load_config(CONFIG, pretrain(data, run, "train.steps=4")[2:])
    found = find_checkpoint(config, Blend.open(config.data))
    assert found is not None and found.folder.name == "step-00000001" and len(found.damaged) == 1


def test_where_all_checkpoints_are_damaged_nothing_starts_over(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    checkpoints = run / "checkpoints"
    damaged(run, "flipped")  # which only the contents show: found by the process that holds the lock
    (checkpoints / "step-00000001" / "manifest.json").write_text("{")
    before = snapshot(run)
    line = refused(*pretrain(data, run, "train.steps=4"))
    assert (
        "are damaged" in line and "checksum differs" in line and "another train.output to start over" in line
    )
    assert snapshot(run) == before
    runtime.stop()
    shutil.rmtree(checkpoints / "step-00000001")
    (checkpoints / "step-00000002").rename(checkpoints / "damaged-step-00000002")
    assert "are damaged: put a whole one there" in refused(*pretrain(data, run, "train.steps=4"))


def test_ranks_that_find_damage_end_the_launch_with_one_line(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    damaged(run, "flipped")
    strict = pretrain(data, run, "train.steps=4", "checkpoint.fall_back=false")[1:]
    launch = start("launch", "--nproc", 2, *strict)
    output, _ = launch.communicate(timeout=120)
    assert launch.returncode == 2, output
    lines = [line for line in output.splitlines() if line.startswith("mlm-train: ")]
    assert len(lines) == 1 and "checksum differs" in lines[0] and "Traceback" not in output


def test_manifest_that_points_outside_is_refused(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    path = run / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["file"] = "../step-00000001/manifest.json"
    del manifest[SEAL]
    write_manifest(path.parent, manifest)
    assert "not a file of that folder" in refused(*pretrain(data, run, "train.steps=4"))


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
