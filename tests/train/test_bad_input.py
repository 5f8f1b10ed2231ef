"""Bad input before or at the start of training: one line, exit code 2, nothing lost."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from mlm_train.checkpoint.manifest import write_manifest
from mlm_train.parallel import runtime
from mlm_train.utils.records import SEAL
from tests.commands import ROOT, listening, mlm_train, refused, start
from tests.train.short_runs import CONFIG, copy_of, pretrain, snapshot

pytestmark = pytest.mark.usefixtures("no_groups_left")


def test_world_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    line = refused("launch", "--nproc", 3, *pretrain(data, tmp_path / "run")[1:])
    assert "train.global_batch_size=8" in line and "the nearest is 6" in line
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
    assert "has 8 GPUs on this node, but torch finds none" in refused(*run, "train.device=auto")
    assert not (tmp_path / "run").exists()


def test_a_rendezvous_that_cannot_be(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = ("launch", "--nproc", 1, "--nodes", 2, *pretrain(data, tmp_path / "run")[1:])
    with socket.create_server(("127.0.0.1", 0)) as stale:  # it would never answer
        endpoint = f"localhost:{stale.getsockname()[1]}"
        line = refused(*launch, "--rendezvous", endpoint)
    assert f"--rendezvous {endpoint}: this port cannot be used on this node (taken by" in line
    assert f"process {os.getpid()}); give another one, the same on every node" in line
    for wrong in ("node1", "node1:port", "node1:70000"):
        assert f"--rendezvous {wrong}: give HOST:PORT" in refused(*launch, "--rendezvous", wrong)
    assert "--rendezvous a.invalid:1: unknown host" in refused(*launch, "--rendezvous", "a.invalid:1")
    monkeypatch.setattr("mlm_train.parallel.launch.rendezvous._HOST_SECONDS", 2)
    silent = "192.0.2.1:29500"  # an address for examples (RFC 5737), where nobody is
    assert f"--rendezvous {silent}: nothing answered there for 2 s" in refused(
        *launch, "--rendezvous", silent
    )
    assert not (tmp_path / "run").exists()


REFUSALS = """
import json, sys
from tests.commands import refused
print(json.dumps([refused(*words) for words in json.load(sys.stdin)]))
"""


def test_places_without_rights(data: Path, trained: Path, tmp_path: Path) -> None:
    """Run as a user bound by file permissions; root drops two capabilities for that."""
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
    assert "fewer than one sample" in refused(*pretrain(data, tmp_path / "run", *long))


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
    # The line names the override; the checkpoints that follow are of the new data.
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
    wild = ("optimizer.lr=1e30", "schedule.rewarm_steps=0", "train.steps=9", "checkpoint.interval=1")
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
    first = start(*pretrain(data, run, "train.steps=2000", "checkpoint.interval=0"))
    try:
        while not (run / "config.yaml").is_file():
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.05)
        before = (run / "config.yaml").read_bytes()
        assert "being trained by another process" in refused(*pretrain(data, run, "optimizer.lr=0.5"))
        launch = start("launch", "--nproc", 2, *pretrain(data, run, "optimizer.lr=0.5")[1:])
        output, _ = launch.communicate(timeout=120)
        lines = [line for line in output.splitlines() if "being trained by another process" in line]
        assert launch.returncode == 2 and len(lines) == 1 and "Traceback" not in output, output
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
    assert launch.returncode == 128 + 15 and "stopped by SIGTERM after step 1;" in output, output
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive


def test_output_that_exists_without_resume(trained: Path, data: Path, tmp_path: Path) -> None:
    before = snapshot(trained)
    assert "nothing is overwritten" in refused(*pretrain(data, trained, "checkpoint.resume=false"))
    assert snapshot(trained) == before
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(*pretrain(data, tmp_path / "file"))


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
    assert "give one of" in refused("evaluate", "--model", export)
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
