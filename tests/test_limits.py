"""What a machine may hold back: open files, a clock that stands still."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlm_train.monitor.heartbeat import Heartbeat
from tests.commands import ROOT, TINY


@pytest.mark.parametrize("count", [64, 80])
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
    heart, now = Heartbeat(tmp_path), time.time
    heart.beat("training", step=1)
    monkeypatch.setattr("time.time", lambda: now() - 3600)
    time.sleep(1.1)
    heart.beat("training", step=2)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 2
