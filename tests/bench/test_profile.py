"""`bench profile`: every mode runs, and its groups account for the operations."""

import json
from pathlib import Path

import pytest

from mlm_train.bench.profile import GROUPS
from tests.commands import finished, refused

TINY = ("--layers", 1, "--hidden", 16, "--heads", 2, "--ffn", 24, "--vocabulary", 50, "--sequence", 8)


@pytest.mark.parametrize("mode", ["base", "table"])
def test_the_report(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    output = finished("bench", "profile", mode, *TINY, "--micro-batches", 3, "--json", file)
    assert "matrix products" in output and "tokens/s; 3 micro-batches of 2 x 8 tokens" in output
    found = json.loads(file.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == GROUPS.keys() - {"compiled elementwise"}
    assert all(row["median"] > 0 for row in rows.values())
    # Forward and backward: qkv, o, gate and up, down; the head's come in blocks.
    assert rows["matrix products"]["calls"] >= 3 * 3 * 5
    assert found["ratios"]["tokens"] == 48 and 0 < found["ratios"]["distinct_ratio"] < 1


def test_bad_input(tmp_path: Path) -> None:
    assert "--layers 0: give at least 1" in refused("bench", "profile", "base", "--layers", 0)
    assert "must divide --hidden 768" in refused("bench", "profile", "base", "--heads", 7)
    no_folder = tmp_path / "no" / "profile.json"
    assert "a folder that exists" in refused("bench", "profile", "base", "--json", no_folder)
