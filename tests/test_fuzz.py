"""Randomly damaged files of every kind: one line and exit code 2 in time, or the undamaged file's result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT

KINDS_OF_READERS = """
import os, sys, time
from pathlib import Path

sys.path.insert(0, "tools")
import fuzz_cases, fuzz_pool
from fuzz_readers import READERS, Reader, Refused
from mlm_train.errors import UserError

def raises(error):
    def read(folder):
        raise error
    return read

READERS.clear()
for name, read in {
    "accepted": lambda folder: "whole",
    "refused": raises(UserError("one line")),
    "refused by a command": raises(Refused(2, "mlm-train: one line")),
    "traceback": raises(KeyError("files")),
    "traceback, two lines": raises(Refused(2, "mlm-train: one line\\nand another")),
    "code": raises(Refused(1, "mlm-train: one line")),
    "time, for ever": lambda folder: time.sleep(3600),
    "time, dies": lambda folder: os.abort(),
    "result": lambda folder: "other",
}.items():
    READERS[name] = Reader("artefact", ("*",), read, lambda folder, file: True)
fuzz_pool.LIMIT = 0.5
root = Path(sys.argv[1])
(root / "artefact").mkdir()
(root / "artefact" / "file.json").write_text('{"a": [1, 2]}')
fuzz = fuzz_cases.Fuzz(root, 1, list(READERS))
fuzz.whole = dict.fromkeys(READERS, "whole")
for outcome in fuzz_pool.outcomes(fuzz, 40, 2):
    print(outcome.kind, outcome.reader, sep=": ", flush=True)
"""


def test_the_fuzzer_tells_good_from_bad(tmp_path: Path) -> None:
    """Readers with each of the bad outcomes."""
    command = [sys.executable, "-c", KINDS_OF_READERS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = [line.split(": ") for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(found) == 40, done.stderr[-4000:]
    assert all(reader.startswith(kind) for kind, reader in found), done.stdout
    assert len({reader for _, reader in found}) == 9


def fuzz(folder: Path, cases: int, seed: int) -> dict[str, Any]:
    """The report of tools/fuzz.py."""
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
    assert done.returncode in (0, 1) and found.exists(), done.stderr[-4000:]
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
