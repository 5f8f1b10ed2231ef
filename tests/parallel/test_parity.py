"""Contract 5: every layout, transport, schedule and mode gives one process's loss and gradients."""

import pytest

from mlm_train.config.parallel import INTERLEAVED, ZERO_BUBBLE
from tests.parallel.layouts import MODES
from tests.parallel.matrix import LAYOUTS, Layout, cases_of
from tests.parallel.pairwise import LAYOUTS as MIXED
from tests.parallel.pairwise import case_of, pairs_of, pairwise, pool, together
from tests.parallel.table import beyond, run_layout
from tests.ranks import run_on_ranks

SEQUENCE = {"tensor": 2, "sequence": True}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_with_one_process(layout: Layout) -> None:
    results = run_layout(layout)
    assert results and beyond(results) == {}


def test_the_matrix_meets_every_value_of_every_axis() -> None:
    met: set[tuple[str, object]] = set()
    for layout in LAYOUTS:
        if layout.pipeline == 1:
            continue
        for case in cases_of(layout).values():
            count = case["train"]["global_batch_size"] // layout.data
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
        "mode": MODES,
        "x0_transport": ("broadcast", "relay", "replicate"),
        "pipeline_schedule": ("gpipe", "1f1b", "interleaved_1f1b", *ZERO_BUBBLE),
        "tied": (True, False),
        "odd": (True, False),
        "divided": (True, False),
        "uneven": (True, False),
        "zero_stage": (0, 2),
    }.items():
        for value in values:
            assert (axis, value) in met, (axis, value)


def test_all_pairs_of_choices_are_compared_or_refused() -> None:
    """Pairs that the config refuses whatever else is chosen, layouts apart: these and no others."""
    candidates, refused = pool()
    taken = [case for cases in pairwise().values() for case in cases.values()]
    choices = [*candidates, *together()]
    covered = set().union(*(pairs_of(choice) for choice in choices if case_of(choice) in taken))
    assert set().union(*map(pairs_of, candidates)) <= covered
    schedules = ("gpipe", "1f1b", "interleaved_1f1b", *ZERO_BUBBLE)
    expected = {(("schedule", schedule), ("zero", 3)) for schedule in schedules}
    expected |= {(("transport", name), ("zero", 3)) for name in ("broadcast", "relay", "replicate")}
    expected |= {(("stages", which), ("zero", 3)) for which in ("longest first", "longest last")}
    tables = [mode for mode in MODES if "table" in mode]
    expected |= {(("mode", mode), ("zero", 3)) for mode in tables}
    expected |= {(("mode", mode), ("transport", name)) for mode in tables for name in ("relay", "replicate")}
    for schedule in ZERO_BUBBLE:
        expected.add((("schedule", schedule), ("recompute", "full")))
        expected.add((("transport", "replicate"), ("schedule", schedule)))
        expected |= {(("mode", mode), ("schedule", schedule)) for mode in tables if "layer" in mode}
    expected |= {(("schedule", name), ("micro_batches", 5)) for name in INTERLEAVED}
    expected.add((("schedule", "dualpipe_v"), ("micro_batches", 3)))
    assert {pair for pair in refused if pair[0][0] != "layout"} == expected
    pipelines = {layout for layout in MIXED if layout.pipeline > 1}
    assert {pair for pair in refused if pair[0][0] == "layout"} == {
        (("layout", layout), ("zero", 3)) for layout in pipelines
    }


def test_bf16_is_no_further_from_fp32_than_one_process() -> None:
    for parallel in (
        {},
        {"tensor": 2, "zero_stage": 0},
        SEQUENCE,
        {"pipeline": 2, "zero_stage": 2},
        {"zero_stage": 3},
    ):
        modes = [
            mode
            for mode in MODES
            if "layer" not in mode and (parallel.get("zero_stage") != 3 or "table" not in mode)
        ]
        distance = run_on_ranks(
            "tests.parallel.parity_cases:run_bf16_cases",
            2,
            model={"kind": "flex", "flex_beta": 2},
            modes=modes,
            micro_batch=1,
            seeds=5,
            parallel=parallel,
        )
        print(parallel, distance)
        assert distance["alone"] > 1e-4, "the peer must really compute in bf16"
        for mode in modes:
            assert distance[mode] <= 1.25 * distance["alone"], (parallel, distance)


# A mistake that careless code makes -> a layout of four ranks in which it must show.
MISTAKES: dict[str, dict] = {
    "labels counted on each rank alone": {},
    "norms not summed over positions": SEQUENCE,
    "norms not summed in each pass": SEQUENCE | {"zero_stage": 2},
    "tied heads not summed": {"pipeline": 2},
    "rows of x0 not summed over positions": SEQUENCE | {"pipeline": 2},
    "gradients scaled by the schedule": {"pipeline": 2},
    "lookups without anchors": {"pipeline": 2, "pipeline_schedule": "zbv"},
    "gradients of shared rows not sent": {},
}
MISTAKEN_MODES = {
    "lookups without anchors": "table",
    "gradients of shared rows not sent": "table shared",
}


def test_the_suite_sees_mistakes() -> None:
    """Each is seen by the loss, the norm or a gradient, a thousand times above the limits."""
    cases = {}
    for mistake, parallel in MISTAKES.items():
        model = {"kind": "memory", "tie_word_embeddings": "tied" in mistake, "num_hidden_layers": 4}
        mode = MISTAKEN_MODES.get(mistake, "unique")
        cases[mistake] = {"model": model, "mode": mode, "micro_batch": 2, "parallel": parallel}
    errors = run_on_ranks("tests.parallel.parity_cases:run_mistaken", 4, cases=cases)
    for mistake, error in errors.items():
        assert max(error["gradients"], error["norm"], error["loss"]) > 1e-2, (mistake, error)


def test_a_lookup_runs_backward_once_a_micro_batch() -> None:
    """Shape inference in the pipeline, or evaluation, would run it more often, on whatever lies in memory."""
    counts = run_on_ranks(
        "tests.parallel.parity_cases:count_lookups", 2, model={"kind": "memory"}, parallel={"pipeline": 2}
    )
    assert counts == [4, 4, 8]  # eight sequences a step, two a micro-batch
