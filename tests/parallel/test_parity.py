"""Contract 5: every layout, transport, schedule and mode gives one process's loss and gradients."""

import pytest

from tests.parallel.matrix import LAYOUTS, MODELS, Layout, cases_of
from tests.parallel.table import run_layout
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_with_one_process(layout: Layout) -> None:
    results = run_layout(layout)
    assert len(results) >= len(MODELS)
    for name, error in results.items():
        assert max(error["loss"], error["norm"], error["gradients"]) <= 1e-5, (name, error)
        assert error["weights"] <= max(1e-4, 2 * error["alone"]), (name, error)


def test_the_matrix_meets_every_value_of_every_axis() -> None:
    met: set[tuple[str, object]] = set()
    for layout in LAYOUTS:
        if layout.pipeline == 1:
            continue
        for case in cases_of(layout).values():
            count = case["train"]["global_batch"] // layout.data
            met |= {(key, value) for key, value in case["parallel"].items() if key != "layers_per_stage"}
            met |= {
                ("kind", case["model"]["kind"]),
                ("mode", case["mode"]),
                ("tied", case["model"].get("tie_word_embeddings", False)),
                ("odd", "vocab_size" in case["model"]),
                ("divided", count % layout.pipeline == 0),
                ("uneven", "layers_per_stage" in case["parallel"]),
            }
    for axis, values in {
        "kind": ("base", "memory", "flex"),
        "mode": ("per_token", "unique"),
        "x0_transport": ("broadcast", "relay", "replicate"),
        "schedule": ("gpipe", "1f1b", "interleaved_1f1b"),
        "tied": (True, False),
        "odd": (True, False),
        "divided": (True, False),
        "uneven": (True, False),
        "zero": (0, 2),
    }.items():
        for value in values:
            assert (axis, value) in met, (axis, value)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_meets_every_zero_stage_it_can_have(layout: Layout) -> None:
    cases = cases_of(layout).values()
    met = {
        (case["parallel"].get("zero", 1), case["model"].get("tie_word_embeddings", False)) for case in cases
    }
    stages = (0, 1, 2, 3) if layout.pipeline == 1 else (0, 1, 2)
    assert met == {(stage, tied) for stage in stages for tied in (False, True)}


def test_bf16_is_no_further_from_fp32_than_one_process() -> None:
    for parallel in ({}, {"tensor": 2, "zero": 0}, {"pipeline": 2, "zero": 2}, {"zero": 3}):
        distance = run_on_ranks(
            "tests.parallel.parity_cases:run_bf16_cases",
            2,
            model={"kind": "flex", "flex_beta": 2},
            modes=["per_token", "unique"],
            micro_batch=1,
            seeds=5,
            parallel=parallel,
        )
        print(parallel, distance)
        assert distance["alone"] > 1e-4, "the peer must really compute in bf16"
        for mode in ("per_token", "unique"):
            assert distance[mode] <= 1.25 * distance["alone"], (parallel, distance)


def test_the_suite_sees_a_wrong_normalisation() -> None:
    """Averaging each rank's own mean, as careless code does, must fail where masks differ by rank."""
    case = {"model": {"kind": "memory"}, "mode": "unique", "micro_batch": 4}
    (error,) = run_on_ranks("tests.parallel.parity_cases:run_with_local_normalisation", 2, cases=[case])
    assert error["gradients"] > 1e-2, error
