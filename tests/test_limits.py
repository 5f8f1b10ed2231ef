"""Limits of a machine: open files, a clock that is set back."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlm_train.monitor.heartbeat import HeartbeatFile
from tests.commands import ROOT, TINY, finished, mlm_train, same_losses, start, wait_for


@pytest.mark.parametrize("count", [16, 18])
def test_few_open_files(data: Path, tmp_path: Path, count: int) -> None:
    words = [sys.executable, "-m", "mlm_train", "pretrain", "configs/micro.yaml", *TINY]
    words += [f"data.path={data}", f"train.output={tmp_path / 'run'}", "train.steps=2"]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count)),
    )  # fmt: skip
    *_, line = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert line.startswith("mlm-train: ") and "ulimit -n" in line, line


def test_a_heartbeat_goes_on_where_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart, now = HeartbeatFile(tmp_path), time.time
    heart.beat("training", step=1)
    monkeypatch.setattr("time.time", lambda: now() - 3600)
    time.sleep(1.1)
    heart.beat("training", step=2)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 2


JUMPING = '''"""Python's clock, which jumps once a file is there: in ranks, agents and Ray's workers too."""
import os, time
real, when, by = time.time, os.environ["CLOCK_JUMPS_WHEN"], float(os.environ["CLOCK_JUMPS_BY"])
time.time = lambda: real() + (by if os.path.exists(when) else 0.0)
'''


@pytest.mark.long
@pytest.mark.parametrize("by", [3600, -3600])
def test_the_time_of_day_jumps_by_an_hour(by: int, data: Path, tmp_path: Path) -> None:
    """During training on two ranks, and during builds into a folder and to a URL, where a lease is held."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(JUMPING)
    jump, run, exported = tmp_path / "jump", tmp_path / "run", tmp_path / "export"
    paths = os.pathsep.join([str(tmp_path / "path"), str(ROOT)])
    environment = {"PYTHONPATH": paths, "CLOCK_JUMPS_WHEN": str(jump), "CLOCK_JUMPS_BY": str(by)}
    words = (
        "launch",
        "--nproc",
        2,
        "configs/micro.yaml",
        *TINY,
        f"data.path={data}",
        "train.watchdog_timeout=20",
        "memory.mode=table",
    )
    usual = tmp_path / "usual"
    more = ("train.steps=60", "checkpoint.interval=20", "train.eval_interval=0")
    finished(*words, *more, f"train.output={usual}")
    training = start(*words, *more, f"train.output={run}", **environment)
    wait_for("step 5/60", run, training)
    jump.touch()
    said, _ = training.communicate(timeout=200)
    assert training.returncode == 0, said
    same_losses(run, usual, 1e-9)
    mlm_train("export", run, "--output", exported)
    for output in (tmp_path / "tol", f"file://{tmp_path / 'url'}"):
        jump.unlink()
        words = ("tol", "build", exported, "--output", output, "--partitions", 64)
        build = start(*words, MLM_TOL_FRESH_SECONDS="6", **environment)
        time.sleep(8)
        jump.touch()
        said, _ = build.communicate(timeout=200)
        assert build.returncode == 0, said
        finished("tol", "verify", tmp_path / str(output).rpartition("/")[2], "--model", exported)
