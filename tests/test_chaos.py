"""Short runs of tools/chaos.py, bitwise equal to the undisturbed run; one has every kind of injury."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

SHORT = ("kill-rank", "flip-bits", "write-fails")
ALL = ("kill-rank", "stop-rank", "flip-bits", "disk-full", "write-fails", "read-only")


@pytest.mark.parametrize(
    ("kinds", "seed"),  # with this seed all processes are killed once a checkpoint was damaged
    [(SHORT, 21), pytest.param(ALL, 21, marks=pytest.mark.long)],
    ids=["three", "all"],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="not root: no tmpfs can be mounted")
def test_injured_once_by_each_kind_and_nothing_is_lost(
    data: Path, tmp_path: Path, kinds: tuple[str, ...], seed: int
) -> None:
    found = tmp_path / "found.json"
    words = ["--events", str(len(kinds)), "--seed", str(seed), "--kinds", ",".join(kinds)]
    words += ["--layouts", "dp2", "--data", str(data), "--folder", str(tmp_path / "chaos")]
    command = [sys.executable, str(ROOT / "tools" / "chaos.py"), *words, "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    if "a tmpfs cannot be mounted" in done.stderr:
        pytest.skip("no tmpfs can be mounted here")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "bitwise equal: yes" in done.stdout
    figures = json.loads(found.read_text())["figures"]
    assert figures["events"] == len(kinds) and figures["by kind (medians)"].keys() == set(kinds)
    assert figures["damaged checkpoints set aside"] == 1 and figures["steps repeated"] > 0
    assert figures["saves failed and said"] >= len({"write-fails", "disk-full", "read-only"} & {*kinds})
    deaths = {kind: row["deaths"] for kind, row in figures["by kind (medians)"].items()}
    assert all(deaths[kind] == 1 for kind in {"kill-rank", "stop-rank", "flip-bits"} & {*kinds})
