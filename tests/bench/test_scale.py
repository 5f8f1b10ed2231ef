"""`bench scale`: what a rank of a world that is not there sends, against the formula and a plain count."""

import json
from pathlib import Path

import pytest

from mlm_train.utils.files import is_png
from tests.commands import mlm_train, refused


def test_bytes_equal_the_formula_and_state_is_shared_evenly(data: Path, tmp_path: Path) -> None:
    report = tmp_path / "scale.json"
    files = ("--json", report, "--plot", report.with_suffix(".png"))
    mlm_train("bench", "scale", "--data", data, "--shapes", "tiny", "--tokens", 2048, *files)
    assert is_png(report.with_suffix(".png"))
    tree = json.loads(report.read_text())
    ratios, rows = tree["ratios"], {row["name"]: row["median"] for row in tree["rows"]}
    for world in ("tiny_dp8", "tiny_tp2_pp2_dp4"):
        assert ratios[f"owned_bytes_over_formula_{world}"] == 1
        assert ratios[f"owned_state_over_ideal_{world}"] == pytest.approx(1, abs=0.02)
        assert ratios[f"exchanges_over_allowed_{world}"] <= 1
        assert rows[f"{world}.fsdp_alone.predicted.compute"] > rows[f"{world}.owned.predicted.compute"] > 0
    assert ratios["fsdp_unsharded_blocks_tiny_dp4"] <= 2
    assert ratios["fsdp_state_over_ideal_tiny_dp4"] == pytest.approx(1, abs=0.05)
    # The base model's blocks, head and final norm in bf16, gathered twice per micro-batch: a rank sends what
    # it has, a quarter, to three others.
    elements = 6 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 512 * 64 + 64
    sent = rows["tiny_dp4.base.bytes.data/allgather_base/bfloat16"]
    assert sent == rows["tiny_dp4.base.micro_batches"] * 2 * 2 * elements * 3 / 4


@pytest.mark.long
def test_whole_steps_on_four_processes(data: Path, tmp_path: Path) -> None:
    report = tmp_path / "scale.json"
    speed = ("--speed", data, "--preset", "tiny", "--runs", 2)
    mlm_train(
        "bench", "scale", "--data", data, "--shapes", "tiny", "--tokens", 2048, "--json", report, *speed
    )
    ratios = json.loads(report.read_text())["ratios"]
    for name in ("fsdp_over_deepspeed", "owned_over_replicated_speed", "owned_over_replicated_peak_memory"):
        assert 0.01 < ratios[name] < 100


def test_mistakes_are_one_line(data: Path) -> None:
    short = refused("bench", "scale", "--data", data, "--shapes", "1b")
    assert "has less than a step of 4,194,304 tokens" in short
    assert "choose from 1b, 7b, 70b" in refused("bench", "scale", "--data", data, "--shapes", "8b")
    assert "needs --data" in refused("bench", "scale")
