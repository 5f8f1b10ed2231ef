"""The commands from a trained run to generated text: export, evaluate, ToL, generate, TensorBoard."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlm_train.checkpoint.hf.manifest import MANIFEST
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.parallel import runtime
from tests.commands import ROOT, TINY, finished, mlm_train, refused, scalars
from tests.partitions import write_table


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a flex model."""
    output = tmp_path_factory.mktemp("road") / "run"
    flex = ("model.kind=flex", "model.flex_beta=2", "model.num_key_value_heads=2")
    paths = (f"data.path={data}", f"train.output={output}")
    mlm_train("pretrain", "configs/micro.yaml", *TINY, *flex, *paths, "train.steps=6")
    runtime.stop()
    return output


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    """Its export."""
    folder = run.parent / "export"
    mlm_train("export", run, "--output", folder)
    return folder


@pytest.fixture(scope="module")
def tol(export: Path) -> Path:
    """Its ToL, built by two Ray workers, in three partitions that do not divide the vocabulary evenly."""
    folder = export.parent / "tol"
    finished("tol", "build", export, "--output", folder, "--dtype", "float32", "--partitions", 3)
    return folder


def output_of(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    capsys.readouterr()
    mlm_train(*words, "--json")
    return json.loads(capsys.readouterr().out)


def test_evaluate_gives_the_runs_own_validation_loss(
    run: Path, export: Path, tol: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ("evaluate", "--model", export, "--data", data, "--sequence-length", 32)
    computed = output_of(capsys, *paths, "--baselines", run)
    looked_up = output_of(capsys, *paths, "--tol", tol)
    assert looked_up["loss"] == pytest.approx(computed["loss"], rel=1e-6)
    assert 1 < computed["bigram"] < computed["unigram"] < 512
    embedded = write_table(tmp_path / "tol", load_model(export), export, [200], with_embeddings=True)
    assert output_of(capsys, *paths, "--tol", embedded)["loss"] == pytest.approx(computed["loss"], rel=1e-6)
    few = output_of(capsys, *paths, "--samples", 3)
    assert few["windows"] == 3 and few["tokens"] == 96
    for option, value in (("samples", 0), ("samples", -3), ("micro-batch-size", 0), ("sequence-length", 0)):
        assert f"--{option} {value}: give at least 1" in refused(*paths, f"--{option}={value}")
    assert "max_position_embeddings=64" in refused(*paths, "--sequence-length", 4096)
    # All windows here, ten of them in the run: near each other, and exact where the run takes all.
    again = run.parent / "again"
    shutil.copytree(run, again)
    all_windows = f"train.eval_samples={computed['windows']}"
    mlm_train(
        "pretrain", run / "config.yaml", f"train.output={again}", all_windows, "train.steps=7",
        "optimizer.lr=1e-30", "schedule.min_lr=0", "schedule.rewarm_steps=0",
    )  # fmt: skip
    runtime.stop()
    assert scalars(again, "validation/loss")[7] == pytest.approx(computed["loss"], rel=1e-6)


def test_generation_agrees_and_never_loads_ffn_m(
    export: Path, tol: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", "--prompt", "import os\n", "--max-new-tokens", 16, "--model")
    computed = output_of(capsys, *words, export)
    looked_up = output_of(capsys, *words, export, "--tol", tol)
    assert computed["ids"] == looked_up["ids"] and len(computed["ids"]) == 16
    # FFN-M's weights may be gone altogether.
    bare = Path(shutil.copytree(export, tmp_path / "bare"))
    tensors = load_file(export / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".memory_" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    assert "model.safetensors" in refused(*words, bare, "--tol", tol)  # not what was written
    (bare / MANIFEST).unlink()
    assert output_of(capsys, *words, bare, "--tol", tol)["ids"] == computed["ids"]
    assert "memory_" in refused(*words, bare)


def test_logits_of_given_tokens(export: Path, tmp_path: Path) -> None:
    tokens = torch.randint(0, 512, (2, 20))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    files = ("--tokens", tmp_path / "tokens.safetensors", "--dump-logits", tmp_path / "logits.safetensors")
    mlm_train("evaluate", "--model", export, *files)
    found = load_file(tmp_path / "logits.safetensors")
    assert torch.equal(found["tokens"], tokens)
    assert found["logits"].shape == (2, 20, 512) and found["logits"].dtype == torch.float32
    before = (tmp_path / "logits.safetensors").read_bytes()
    refused("evaluate", "--model", export, *files)
    assert (tmp_path / "logits.safetensors").read_bytes() == before


def test_damage_and_mistakes(export: Path, tol: Path, tmp_path: Path) -> None:
    generate = ("generate", "--model", export, "--max-new-tokens", 4)
    assert "no tokens" in refused(*generate, "--prompt", "")
    assert "no tokens" in refused(*generate, "--prompt-ids", "")
    assert "max_position_embeddings" in refused(*generate, "--prompt", "x " * 200)
    assert "holds no model" in refused("generate", "--model", tmp_path, "--prompt-ids", "1")
    broken = Path(shutil.copytree(tol, tmp_path / "broken"))
    victim = sorted(broken.glob("rows-*"))[1]
    contents = bytearray(victim.read_bytes())
    contents[-5] ^= 64
    victim.write_bytes(contents)
    check = subprocess.run(
        [sys.executable, "-m", "mlm_train", "tol", "verify", str(broken), "--model", str(export)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert check.returncode == 2 and victim.name in check.stderr and "rows [340, 341)" in check.stderr
    victim.write_bytes(contents[:-100])
    assert victim.name in refused(*generate, "--prompt", "x", "--tol", broken)
    victim.unlink()
    assert "is missing" in refused(*generate, "--prompt", "x", "--tol", broken)


def test_monitor_serves_the_run_on_loopback(run: Path) -> None:
    command = [sys.executable, "-m", "mlm_train", "monitor", str(run), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        address = next(
            found.group() for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line))
        )
        deadline = time.monotonic() + 60
        tags: dict = {}
        while not tags.get("tensorboard") and time.monotonic() < deadline:
            with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=30) as answer:
                tags = json.load(answer)
            time.sleep(0.3)
        assert {"train/loss", "validation/loss", "speed/mfu_measured"} <= tags["tensorboard"].keys()
    finally:
        left = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        process.wait(timeout=30)
    assert not psutil.wait_procs(left, 30)[1]
    assert "is not a folder" in refused("monitor", run / "nothing")
