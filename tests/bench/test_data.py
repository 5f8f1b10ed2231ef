"""`bench data`: megatron-core reads the same files; the report's schema."""

import json
from pathlib import Path

from tests.commands import finished, refused


def test_the_report(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    size = ("--sequence-length", 64, "--samples", 64, "--runs", 3)
    output = finished("bench", "data", "--data", data, *size, "--json", file)
    assert "labels are not" not in output and "3 runs of 64 samples" in output
    found = json.loads(file.read_text())
    assert found.keys() == {"machine", "command", "rows", "ratios"}
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == {f"{name}.{what}" for name in ("ours", "megatron") for what in ("samples", "start")}
    assert all(rows[f"{name}.samples"]["runs"] == 3 for name in ("ours", "megatron"))
    ratio = rows["ours.samples"]["median"] / rows["megatron.samples"]["median"]
    assert found["ratios"] == {"loader_over_megatron": ratio}


def test_bad_input(data: Path, tmp_path: Path) -> None:
    bench = ("bench", "data", "--data")
    assert "holds no prepared data" in refused(*bench, tmp_path)
    assert "--runs 0: give at least 1" in refused(*bench, data, "--runs", 0)
    assert "--samples 9: give a multiple of --batch 8" in refused(*bench, data, "--samples", 9)
    assert "fewer than one sample" in refused(*bench, data, "--sequence-length", 10**8)
