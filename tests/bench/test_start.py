"""`bench start`: rank 0 of a large world starts, with no call for groups that its config does not use."""

import json
from pathlib import Path

from tests.commands import mlm_train, refused


def test_a_start_in_a_large_world(data: Path, tmp_path: Path) -> None:
    report, world = tmp_path / "start.json", 512
    overrides = (f"data.path={data}", "train.global_batch_size=512", "train.micro_batch_size=1")
    more = ("model.vocab_size=512", "monitor.peak_tflops=1", "--world", world, "--runs", 1)
    mlm_train("bench", "start", "configs/micro.yaml", *overrides, *more, "--json", report)
    rows = {row["name"]: row["median"] for row in json.loads(report.read_text())["rows"]}
    parts = ("imports", "checks", "process groups", "checkpoint", "model", "weights", "callbacks")
    assert all(rows[f"start.{part}"] >= 0 for part in parts)
    # tensor and pipeline: a group per rank; data, stage and its CPU group; the world's, and the writer's.
    assert rows["start.new_groups"] <= 2 * world + 8, rows


def test_a_config_is_needed() -> None:
    assert "bench start needs a config" in refused("bench", "start")
