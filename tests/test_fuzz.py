"""Damaged files of every kind, by chance: one line and exit code 2 in time, or the undamaged one's result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT


def fuzz(folder: Path, cases: int, seed: int) -> dict[str, Any]:
    """What tools/fuzz.py found."""
    found = folder / "found.json"
    words = [
        "--cases",
        str(cases),
        "--seed",
        str(seed),
        "--json",
        str(found),
        "--folder",
        str(folder / "bad"),
    ]
    command = [sys.executable, str(ROOT / "tools" / "fuzz.py"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode in (0, 1), done.stderr[-4000:]
    report: dict[str, Any] = json.loads(found.read_text())
    assert report["bad"] == [], done.stdout[-4000:] + done.stderr[-4000:]
    return report


def test_no_reader_trips_over_a_few_hundred_damaged_files(tmp_path: Path) -> None:
    report = fuzz(tmp_path, cases=400, seed=5)
    counts = report["readers"]
    assert sum(sum(kinds.values()) for kinds in counts.values()) == 400 and len(counts) >= 20
    assert all(counts.values()), counts  # each reader had its share
    assert sum(kinds.get("refused", 0) for kinds in counts.values()) > 200


@pytest.mark.long
def test_no_reader_trips_over_thirty_thousand(tmp_path: Path) -> None:
    fuzz(tmp_path, cases=30_000, seed=1)
