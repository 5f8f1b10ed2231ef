"""Tables shared over data parallel: FLOPs per rank, and bytes exchanged."""

import torch

from mlm_train.parallel.ffn_m.owners import units_of
from tests.ranks import run_on_ranks


def test_flops_fall_with_the_data_parallel_size_and_bytes_equal_the_formula() -> None:
    """One global batch on 1, 2 and 4 processes: FLOPs counted by torch, bytes at the dispatcher."""
    target, modes = "tests.parallel.share_cases:count_work", ["table", "table shared"]
    (whole,), (kept,) = run_on_ranks(target, 1, modes=["table", "table kept"])
    assert kept["flops"] == whole["flops"] * 11 / 12  # no second forward pass in one layer of three
    for ranks in (2, 4):
        alone, shared = run_on_ranks(target, ranks, modes=modes)
        print(ranks, whole, shared, alone)
        assert sum(rank["rows"] for rank in shared) == whole["distinct"] == whole["rows"]
        assert sum(rank["flops"] for rank in shared) == whole["flops"]
        for rank in shared:
            assert abs(rank["flops"] / (whole["flops"] / ranks) - 1) < 0.1
            assert rank["sent"] == rank["formula"] > 0
        for rank in alone:  # each rank computes its own rows: more than its part of the union
            assert rank["flops"] > 1.3 * whole["flops"] / ranks
            assert rank["sent"] == 0


def test_tensor_ranks_sum_rows_once_per_step() -> None:
    """With tables, the bytes of x0 and FFN-M in a step grow with its distinct ids, not its micro-batches."""
    found = run_on_ranks("tests.parallel.share_cases:tensor_traffic", 2, modes=["per_token", "table"])
    layers, row = 3, 2 * 32 * 4  # an all-reduce of two ranks: a reduce and a broadcast, fp32
    step = {mode: found[f"{mode} 3"] - found[f"{mode} 1"] for mode in ("per_token", "table")}
    # Two more micro-batches: FFN-M once forward and once backward in each layer.
    assert step["per_token"] - step["table"] == 2 * 2 * layers * found["positions"] * row
    # Per step in any mode: its rows' embeddings. With tables, per layer: FFN-M twice forward, once backward.
    assert found["per_token 1"] - step["per_token"] / 2 == found["distinct"] * row
    assert found["table 1"] - step["table"] / 2 == (1 + 3 * layers) * found["distinct"] * row


def test_units_are_spread_evenly_whatever_the_ids() -> None:
    for ids in (torch.arange(30_000), torch.arange(0, 240_000, 8), torch.arange(120_000, 130_000)):
        for ranks in (2, 3, 8, 64):
            counts = units_of(ids, ranks).bincount(minlength=ranks)
            assert counts.max() < 1.25 * len(ids) / ranks, (ranks, counts)
