"""Background saves of several ranks, and a resume from a slow disk."""

from pathlib import Path

import pytest

from mlm_train.checkpoint.load import open_checkpoint
from tests.checkpoint.test_shares import FSDP, ODD, fsdp, zero
from tests.ranks import run_on_ranks

BESIDE = {1: {"alone": fsdp()}, 2: {"ZeRO-1": zero(1), "FSDP": fsdp()}}


@pytest.mark.parametrize("world", BESIDE)
def test_background_saves_are_those_of_their_steps(tmp_path: Path, world: int) -> None:
    """Two in a row, the second one also asked for while the first is still written."""
    found = run_on_ranks(
        "tests.checkpoint.save_cases:save_twice",
        world,
        folder=str(tmp_path),
        model=ODD,
        layouts=BESIDE[world],
    )
    assert len(found) == 2 * len(BESIDE[world])
    assert all(same == [True] * 3 for same in found.values()), found


def test_a_rank_that_cannot_write_on_leaves_nothing(tmp_path: Path) -> None:
    """Its disk ends within its file: the others hear of it, the older checkpoint stays, the next is whole."""
    found = run_on_ranks(
        "tests.checkpoint.save_cases:fail_on_one_rank", 3, folder=str(tmp_path), model=ODD, layout=FSDP
    )
    (line,) = found["said"]
    assert line.startswith(f"NOT saved: {tmp_path}/checkpoints cannot be written: File too large; ")
    assert line.endswith(" | the last good one is step-00000001; training continues")
    one, two, three = (f"step-{step:08d}" for step in (1, 2, 3))
    assert found["left"] == [["latest", one], ["latest", one], ["latest", one, three]], two
    assert open_checkpoint(tmp_path / "checkpoints" / three).progress.step == 3


def test_a_resume_from_a_slow_disk(tmp_path: Path) -> None:
    """A resume in which one rank hashes ten times as long as the watchdog allows; the others wait."""
    root = tmp_path / "checkpoints"
    run_on_ranks("tests.checkpoint.share_cases:save", 2, folder=str(root), model=ODD, layout=FSDP)
    limit = 1.0
    took = run_on_ranks(
        "tests.checkpoint.save_cases:resume_slowly", 2, folder=str(tmp_path), model=ODD, limit=limit
    )
    assert took > 10 * limit
