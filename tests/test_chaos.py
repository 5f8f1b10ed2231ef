"""A short run of tools/chaos.py: every kind of injury, bitwise equal to the undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

KINDS = ("kill-rank", "stop-rank", "flip-bits", "disk-full", "write-fails", "read-only")
# With which all processes are killed once a checkpoint was damaged, and nothing else is but the killed rank.
SEED = 21


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="not root: no tmpfs can be mounted")
def test_injured_six_times_and_nothing_is_lost(data: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    words = ["--events", str(len(KINDS)), "--seed", str(SEED), "--kinds", ",".join(KINDS)]
    words += ["--layouts", "dp2", "--data", str(data), "--folder", str(tmp_path / "chaos")]
    command = [sys.executable, str(ROOT / "tools" / "chaos.py"), *words, "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    if "a tmpfs cannot be mounted" in done.stderr:
        pytest.skip("no tmpfs can be mounted here")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "bitwise equal: yes" in done.stdout
    figures = json.loads(found.read_text())["figures"]
    assert figures["events"] == len(KINDS) and figures["by kind (medians)"].keys() == set(KINDS)
    assert figures["damaged checkpoints set aside"] == 1 and figures["steps repeated"] > 0
    assert figures["saves failed and said"] >= 3
    deaths = {kind: row["deaths"] for kind, row in figures["by kind (medians)"].items()}
    assert deaths["kill-rank"] == deaths["stop-rank"] == deaths["flip-bits"] == 1
