"""Engines: bytes per rank, the gradient norm without clipping and of a non-finite step."""

import math

import pytest

from tests.ranks import run_on_ranks

STAGES = [0, 1, 2, 3]


def test_each_stage_holds_the_planned_bytes() -> None:
    engines = [{"zero_stage": stage} for stage in STAGES]
    counted = run_on_ranks("tests.parallel.zero_cases:count_bytes", 2, engines=engines)
    whole = counted[0]["held"]["weights"]
    tensor = 2 * 4 * 48 * 32  # the largest tensor: where two ranks split it, both hold it whole
    for stage, bytes_ in zip(STAGES, counted, strict=True):
        held, planned = bytes_["held"], bytes_["planned"]
        print(stage, held, planned)
        assert held["weights"] == pytest.approx(planned["weights"], rel=0.02), stage
        assert held["optimizer"] == pytest.approx(planned["optimizer"], rel=0.02), stage
        spare = tensor if stage == 2 else 0.02 * whole
        assert abs(held["gradients"] - planned["gradients"]) <= spare, stage
    planned = [bytes_["planned"] for bytes_ in counted]
    assert [p["weights"] / whole for p in planned] == pytest.approx([1, 1, 1, 0.5], rel=0.01)
    assert [p["gradients"] / whole for p in planned] == pytest.approx([1, 1, 0.5, 0.5], rel=0.01)
    assert [p["optimizer"] / whole for p in planned] == pytest.approx([2, 1.5, 1.5, 1.5], rel=0.01)


def test_fsdp_holds_the_planned_bytes() -> None:
    """Half of all but the embedding's; whole gradients unless each pass reduces them."""
    engines = [{"engine": "fsdp"}, {"engine": "fsdp", "reduce_each_micro_batch": True}]
    counted = run_on_ranks("tests.parallel.zero_cases:count_bytes", 2, engines=engines)
    for bytes_ in counted:
        held, planned = bytes_["held"], bytes_["planned"]
        print(held, planned)
        for part in ("weights", "gradients", "optimizer"):
            assert held[part] == pytest.approx(planned[part], rel=0.02), part
    assert counted[1]["held"]["gradients"] < 0.7 * counted[0]["held"]["gradients"]


def test_every_stage_reports_the_norm_without_clipping() -> None:
    optimizer = {"lr": 1e-2, "max_grad_norm": 0.0}
    case = {"model": {"kind": "memory"}, "mode": "unique", "micro_batch": 2, "optimizer": optimizer}
    cases = [case | {"parallel": {"zero_stage": stage}} for stage in STAGES]
    for stage, error in zip(
        STAGES, run_on_ranks("tests.parallel.parity_cases:run_cases", 2, cases=cases), strict=True
    ):
        assert max(error["loss"], error["norm"], error["gradients"]) <= 1e-5, (stage, error)
        assert error["weights"] <= 1e-4, (stage, error)


def test_every_stage_reports_nonfinite_gradients() -> None:
    norms = run_on_ranks("tests.parallel.zero_cases:refuse_an_update", 2, stages=STAGES)
    assert not any(math.isfinite(norm) for norm in norms), norms


def test_the_suite_detects_a_copy_of_the_embedding_counted_twice() -> None:
    case = {
        "model": {"kind": "memory", "tie_word_embeddings": True},
        "mode": "unique",
        "micro_batch": 1,
        "train": {"global_batch_size": 4},
    }
    cases = [case | {"parallel": {"pipeline": 2, "zero_stage": stage}} for stage in (0, 2)]
    for error in run_on_ranks("tests.parallel.zero_cases:run_counting_copies_twice", 2, cases=cases):
        assert error["norm"] > 1e-2, error
