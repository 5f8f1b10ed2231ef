"""`bench x0`: counts equal the formulas, the report's schema, and a wrong count is found."""

import json
from pathlib import Path

import pytest

from mlm_train.bench import x0
from mlm_train.parallel.pipeline.x0 import TRANSPORTS
from tests.commands import finished, refused
from tests.ranks import run_on_ranks

TOKENS = 2560  # per step
HIDDEN_BYTES = 128 * 4  # per position, fp32


def test_traffic_counts_operations_of_known_size_and_refuses_others() -> None:
    counted = run_on_ranks("tests.bench.traffic_cases:count_operations", 2)
    one = 10 * 4
    assert counted == {
        "broadcast_": one,
        "reduce_": one,
        "allreduce_": 2 * 2 * one,
        "send": one + 2 * (5 * 4),
        "refused": 2,
    }


@pytest.mark.parametrize(
    ("schedule", "boundaries"), [pytest.param("1f1b", 1, marks=pytest.mark.long), ("interleaved_1f1b", 3)]
)
def test_counted_bytes_equal_the_formulas(schedule: str, boundaries: int, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "x0.json"
    words = ["bench", "x0", "--stages", 2, "--runs", 2, "--pipeline-schedule", schedule, "--json", file]
    text = boundaries == 1
    output = finished(*words, *(("--data", data) if text else ()))
    assert "NO" not in output and ("text of" if text else "Zipf") in output
    found = json.loads(file.read_text())
    assert found.keys() == {"machine", "command", "rows", "ratios"}
    assert {"processor", "cores", "torch", "threads_per_process"} <= found["machine"].keys()
    assert found["command"].startswith("mlm-train bench x0 --stages 2")
    rows = {row["name"]: row for row in found["rows"]}
    for name in TRANSPORTS:
        counted, formula = rows[f"s2.{name}.bytes_counted"], rows[f"s2.{name}.bytes_formula"]
        assert counted | {"name": ""} == formula | {"name": ""} and counted["runs"] == 2
        step = rows[f"s2.{name}.step"]
        assert step.keys() == {"name", "median", "min", "max", "unit", "runs"}
        assert (step["unit"], step["runs"]) == ("ms", 2)
        assert 0 < step["min"] <= step["median"] <= step["max"]
    # Known without any code of ours: the hidden state, or x0, and its gradient at every boundary.
    crossing = 2 * TOKENS * HIDDEN_BYTES * boundaries
    assert rows["s2.relay.bytes_counted"]["min"] == crossing
    assert 0 <= rows["s2.without_x0.bytes_counted"]["min"] - crossing < 1000
    vocabulary = 512 if text else 2048
    assert rows["s2.replicate.bytes_counted"]["min"] == 2 * vocabulary * HIDDEN_BYTES
    assert 0 < rows["s2.broadcast.bytes_counted"]["max"] <= 2 * vocabulary * HIDDEN_BYTES
    ratio = found["ratios"]["s2.broadcast_over_relay_bytes"]
    medians = [rows[f"s2.{name}.bytes_counted"]["median"] for name in ("broadcast", "relay")]
    assert ratio == pytest.approx(medians[0] / medians[1]) and ratio < 1
    assert found["ratios"].keys() == {
        f"s2.broadcast_over_{other}_{what}" for other in ("relay", "replicate") for what in ("bytes", "time")
    }


@pytest.mark.parametrize("fault", ["none", "count", "loss"])
def test_a_difference_ends_with_exit_code_1(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"counted": [8, 8], "formula": [8, 8], "losses": [2.0, 1.9], "seconds": [0.1]}
    transports = {name: dict(figures) for name in TRANSPORTS}
    if fault == "count":
        transports["relay"]["counted"] = [8, 9]
    if fault == "loss":
        transports["relay"]["losses"] = [2.0, 1.9001]
    result = {"transports": transports, "without_x0": [8, 8], "distinct": [3, 3], "tokens": 9}
    monkeypatch.setattr(x0, "_launch", lambda order: result)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert x0.bench_x0([2], 1, "1f1b", None, None) == int(fault != "none")


def test_bad_input(tmp_path: Path) -> None:
    assert "give 2 to 8" in refused("bench", "x0", "--stages", 1)
    assert "give 2 to 4" in refused("bench", "x0", "--stages", 8, "--pipeline-schedule", "interleaved_1f1b")
    assert "give at least 1" in refused("bench", "x0", "--runs", 0)
    assert "holds no prepared data" in refused("bench", "x0", "--data", tmp_path)
    assert "a folder that exists" in refused("bench", "x0", "--json", tmp_path / "no" / "x0.json")
