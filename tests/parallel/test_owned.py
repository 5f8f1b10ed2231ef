"""FFN-M owned by few ranks: work and bytes of a rank, and checkpoints that move between placements."""

from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

GROUP = 64 * 2**20


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_flops_fall_with_the_ranks_and_bytes_equal_the_formula(ranks: int) -> None:
    """FLOPs counted by torch, bytes at the dispatcher."""
    ((whole,),) = run_on_ranks("tests.parallel.owned_cases:count_work", 1, modes=["table"])
    (owned,) = run_on_ranks("tests.parallel.owned_cases:count_work", ranks, modes=["table owned"])
    assert sum(rank["flops"] for rank in owned) == whole["flops"]
    for rank in owned:
        print(ranks, rank)
        assert rank["flops"] == pytest.approx(whole["flops"] / ranks, rel=0.15)  # rows are split by hash
        assert rank["sent"] == rank["formula"] > 0
        assert rank["row_exchanges"] <= 2 + 2 * -(-rank["sent"] // GROUP)
        assert rank["exchanges"] - rank["row_exchanges"] == 2  # weights of layers with several owners


def test_checkpoints_move_between_placements_bit_by_bit(tmp_path: Path) -> None:
    """Owned, shared, replicated, without tables; FSDP and ZeRO; data, tensor and pipeline parallel."""
    assert run_on_ranks("tests.parallel.owned_cases:move", 2, folder=str(tmp_path)) == []
