"""The road of a reproduction at the smallest scale: killed, resumed, measured."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import ROOT, mlm_train, refused


@pytest.fixture(scope="module")
def text(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(corpus, tmp_path_factory.mktemp("text") / "prose")


def words(text: Path, output: Path, *items: object) -> list[str]:
    return [
        str(word) for word in ("reproduce", *items, "--scale", "tiny", "--text", text, "--output", output)
    ]


def ended_by(number: signal.Signals, command: list[str], due: Callable[[], bool]) -> int:
    """Run a command until a signal is due, and send it. Returns its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "mlm_train", *command], cwd=ROOT)
    while not due():
        assert process.poll() is None, "it ended first"
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait()


def test_a_killed_reproduction_goes_on(text: Path, tmp_path: Path) -> None:
    """Signals in the middle of a training: what has ended is not run again, the training resumes."""
    command = words(text, tmp_path, "train", "--number", 1)
    run = tmp_path / "runs/base-s0"
    first = run / "checkpoints/step-00000010"
    assert ended_by(signal.SIGTERM, command, first.is_dir) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in (run / "train.log").read_text()
    assert ended_by(signal.SIGKILL, command, lambda: "resumed from" in (run / "train.log").read_text()) < 0
    notes = {file.name: file.read_bytes() for file in (tmp_path / "steps").iterdir()}
    assert notes.keys() == {"data.json", "synthetic.json", "synthetic-data.json"}
    mlm_train(*command)
    after = {file.name: file.read_bytes() for file in (tmp_path / "steps").iterdir()}
    assert notes.items() <= after.items() and after.keys() - notes.keys() == {"train.base.s0.json"}
    log = (run / "train.log").read_text()
    assert log.count("resumed from") == 2 and "step 60/60" in log
    mlm_train("checkpoint", "list", run)
    (tmp_path / "steps/data.json").write_text(json.dumps({"words": ["data"], "seconds": 1.0}))
    assert "is of another command (mlm-train data)" in refused(*command)


@pytest.mark.long
def test_all(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlm_train(*words(text, tmp_path, "all"))
    out = capsys.readouterr().out
    assert "steps to run, predicted: " in out and "all steps took " in out
    mlm_train("reproduce", "page", "--output", tmp_path, "--page", tmp_path / "findings.md")
    page = (tmp_path / "findings.md").read_text()
    assert page.count("\n## ") == len(list((tmp_path / "findings").iterdir())) and "tiny" in page
    assert f"`mlm-train reproduce table2 --scale tiny --text {text} --output {tmp_path}`, " in page
