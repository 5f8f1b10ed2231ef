"""`bench checkpoint`: bad arguments are refused; the report's schema; ranks share what a checkpoint costs."""

import json
from pathlib import Path

from tests.commands import finished, refused

RATIOS = {
    "stall_over_copy",
    "stall_over_save",
    "save_bandwidth_over_plain",
    "save_bandwidth_over_plain_direct",
    "background_over_foreground",
    "load_bandwidth_over_plain",
    "load_bandwidth_over_plain_unverified",
    "load_bandwidth_over_plain_cached",
    "step_meanwhile_over_step",
    "save_bytes_per_rank_dp2_over_dp1",
    "copied_bytes_per_rank_dp2_over_dp1",
    "stall_dp2_over_dp1",
    "stall_cpu_dp2_over_dp1",
    "copy_dp2_over_dp1",
    "stall_over_copy_dp2",
    "opens_per_rank_dp2_over_dp1",
    "load_bytes_over_model_dp2",
    "load_bytes_over_model_dp2_verified",
}


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    for words, said in (
        (("--gib", 0), "--gib 0.0: give more than 0"),
        (("--gib", "nan"), "--gib nan: give more than 0"),
        (("--gib", 1e9), "GiB free, but 4000000000.0 are needed"),
        (("--runs", 0), "--runs 0"),
        (("--ranks", 0), "--ranks 0"),
        (("--folder", tmp_path / "none"), "name an existing folder"),
        (("--json", tmp_path / "none" / "x.json"), "name a file in a folder that exists"),
    ):
        assert said in refused("bench", "checkpoint", *words)


def test_ranks_share_what_a_checkpoint_costs(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.json"
    words = ["--gib", 0.01, "--ranks", 2, "--runs", 1, "--folder", tmp_path, "--json", file]
    output = finished("bench", "checkpoint", *words)
    found = json.loads(file.read_text())
    assert found.keys() == {"machine", "command", "rows", "ratios"}
    ratios = found["ratios"]
    assert ratios.keys() == RATIOS and all(value > 0 for value in ratios.values())
    assert all(name in output for name in RATIOS)
    assert ratios["save_bytes_per_rank_dp2_over_dp1"] <= 0.52
    assert ratios["copied_bytes_per_rank_dp2_over_dp1"] <= 0.52
    assert ratios["opens_per_rank_dp2_over_dp1"] <= 1.2
    assert ratios["load_bytes_over_model_dp2"] <= 1.05
    assert ratios["load_bytes_over_model_dp2_verified"] <= 2.05
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["written"]["unit"] == rows["dp2.read_verified"]["unit"] == "bytes"
    assert rows["opens"]["unit"] == "files" and rows["dp2.stall"]["unit"] == "s"
    assert rows["copied"]["median"] <= rows["written"]["median"] <= 1.01 * rows["copied"]["median"]
    assert not list(tmp_path.glob("bench-checkpoint-*"))
