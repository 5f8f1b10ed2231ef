"""Ranks started by another launcher: every one of them reports what is wrong."""

import os
from pathlib import Path

import pytest

from tests.commands import refused
from tests.train.short_runs import pretrain

WHOLE = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}  # fmt: skip
# Changes of a complete environment (None: missing), and the variable that the line must name.
WRONG: list[tuple[dict[str, str | None], str]] = [
    ({"MASTER_ADDR": None}, "MASTER_ADDR"),
    ({"MASTER_PORT": None}, "MASTER_PORT"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT=http"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
    ({"RANK": None}, "RANK"),
    ({"RANK": "x"}, "RANK=x"),
    ({"RANK": ""}, "RANK="),
    ({"RANK": "1\n1"}, "RANK="),
    ({"RANK": "4"}, "RANK=4"),
    ({"RANK": "-1"}, "RANK=-1"),
    ({"WORLD_SIZE": None}, "WORLD_SIZE"),
    ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE=4.0"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ({"LOCAL_RANK": None}, "LOCAL_RANK"),
    ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK=gpu0"),
    ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4"),
    ({"LOCAL_RANK": "9", "LOCAL_WORLD_SIZE": None}, "LOCAL_RANK=9"),
    ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5"),
    ({"LOCAL_WORLD_SIZE": "2\n2"}, "LOCAL_WORLD_SIZE"),
    (dict.fromkeys(WHOLE) | {"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK"),
    (dict.fromkeys(WHOLE) | {"WORLD_SIZE": "4"}, "RANK"),
    (dict.fromkeys(WHOLE) | {"RANK": "0"}, "WORLD_SIZE"),
    (dict.fromkeys(WHOLE) | {"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR"),
]


@pytest.mark.parametrize(("change", "named"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_an_environment_that_is_no_ranks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], named: str
) -> None:
    for name, value in (WHOLE | change).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    before = dict(os.environ)
    run = pretrain(data, tmp_path / "run")
    for command in (run, [*run, "--dry-run"]):
        assert named in refused(*command)
    assert not (tmp_path / "run").exists() and dict(os.environ) == before


@pytest.mark.parametrize("rank", range(4))
def test_bad_input_is_said_by_every_rank(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The first exit makes its agent end the others, which may not have reported it yet."""
    for name, value in (WHOLE | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items():
        monkeypatch.setenv(name, value)
    assert "train.global_batch_size=9" in refused(
        *pretrain(data, tmp_path / "run", "train.global_batch_size=9")
    )
    assert str(tmp_path / "nowhere") in refused(*pretrain(tmp_path / "nowhere", tmp_path / "run"))
    assert f"rank {rank}" in refused(*pretrain(data, tmp_path / "run", "train.no=1")) or rank == 0
