"""`bench auto`: the report and rejected options; no timings are asserted."""

import json
from pathlib import Path

from mlm_train.bench.auto import MODES
from tests.commands import finished, refused


def test_the_report(tmp_path: Path) -> None:
    file = tmp_path / "auto.json"
    output = finished("bench", "auto", "--runs", 2, "--shapes", "pair", "narrow", "--json", file)
    assert "auto chooses" in output and "pair" in output
    found = json.loads(file.read_text())
    assert {row["name"] for row in found["rows"]} == {f"{s}.{m}" for s in ("pair", "narrow") for m in MODES}
    assert all(row["runs"] == 2 and row["median"] > 0 for row in found["rows"])
    assert found["ratios"].keys() == {"pair.auto_over_best", "narrow.auto_over_best"}
    assert all(ratio >= 1 for ratio in found["ratios"].values())


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    assert "choose from single, pair" in refused("bench", "auto", "--shapes", "round")
    assert "--runs 0" in refused("bench", "auto", "--runs", 0)
    assert "name a file" in refused("bench", "auto", "--json", tmp_path)
