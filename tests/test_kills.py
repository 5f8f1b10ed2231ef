"""tools/kills.py: ranks killed while they save, and nothing that was committed is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.long)])
def test_kills_during_saves(tmp_path: Path, kills: int) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "tools" / "kills.py"), "--kills", str(kills), "--json", str(found)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads(found.read_text())
    assert figures["kills"] == sum(sum(row.values()) for row in figures["moments"].values()) == kills
    assert figures["checkpoints committed"] > 0
    if kills == 200:
        assert all(sum(row.values()) >= 3 for row in figures["moments"].values()), figures
        assert {"copying", "writing and hashing", "renaming", "pruning"} <= figures["moments"].keys()
