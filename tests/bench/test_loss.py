"""`bench loss`: the report's schema, the peak memory of the chunked method, and detection of differences."""

import json
from pathlib import Path

import pytest

from mlm_train.bench import loss
from tests.commands import finished, refused


def test_the_report_and_the_peak(tmp_path: Path) -> None:
    file = tmp_path / "loss.json"
    size = ("--vocabulary", 16000, "--hidden", 64, "--tokens", 2048, "--chunk", 100)
    output = finished("bench", "loss", *size, "--runs", 2, "--json", file)
    assert "differ" not in output and "chunks of 100 tokens" in output
    found = json.loads(file.read_text())
    assert found.keys() == {"machine", "command", "rows", "ratios"}
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == {
        f"{method}.{figure}" for method in loss.METHODS for figure in ("peak_memory", "step", "processor")
    }
    assert all(row["runs"] == 2 and row["median"] > 0 for row in rows.values())
    # The plain method holds at least the logits in bf16 and in fp32.
    assert rows["plain.peak_memory"]["min"] > 16000 * 2048 * 6
    ratio = found["ratios"]["chunked_over_plain_peak_memory"]
    medians = [rows[f"{method}.peak_memory"]["median"] for method in ("chunked", "plain")]
    assert ratio == pytest.approx(medians[0] / medians[1]) and ratio < 0.25
    assert {"chunked_over_plain_speed", "chunked_over_plain_speed_by_processor_time"} < found["ratios"].keys()


@pytest.mark.parametrize("fault", ["none", "loss", "weight_norm", "not a number"])
def test_a_difference_ends_with_exit_code_1(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(order: dict) -> dict[str, float]:
        found = {"seconds": 1.0, "processor": 1.0, "peak": 8, "loss": 2.0, "hidden_norm": 1.0}
        found["weight_norm"] = 1.0
        if order["method"] == "chunked" and fault in found:
            found[fault] *= 1.001
        if order["method"] == "chunked" and fault == "not a number":
            found["loss"] = float("nan")
        return found

    monkeypatch.setattr(loss, "_in_a_process", result)
    order = {"vocabulary": 9, "hidden": 2, "tokens": 3, "precision": "fp32", "chunk": None}
    assert loss.bench_loss(order, 2, None) == int(fault != "none")


def test_bad_input(tmp_path: Path) -> None:
    assert "give at least 1" in refused("bench", "loss", "--runs", 0)
    assert "--tokens 0: give at least 1" in refused("bench", "loss", "--tokens", 0)
    assert "are free; give fewer" in refused("bench", "loss", "--tokens", 10**9)
    assert "a folder that exists" in refused("bench", "loss", "--json", tmp_path / "no" / "loss.json")
