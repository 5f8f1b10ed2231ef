"""A short run of tools/interrupts.py: signals at random moments, without a bad case."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

COMMANDS = ("import", "prepare", "build")
MOMENTS = 1  # of each: the start of Python and its libraries takes the time


@pytest.mark.long
def test_signals_at_random_moments(tmp_path: Path) -> None:
    found, seed = tmp_path / "found.json", random.randrange(2**32)
    print("seed", seed)
    words = ["--moments", str(MOMENTS), "--commands", ",".join(COMMANDS), "--seed", str(seed)]
    command = [sys.executable, str(ROOT / "tools" / "interrupts.py"), *words, "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads(found.read_text())["figures"]
    assert figures.keys() == set(COMMANDS)
    for row in figures.values():
        assert row["moments"] == MOMENTS == row["stopped"] + row["had finished"] and not row["bad"]
