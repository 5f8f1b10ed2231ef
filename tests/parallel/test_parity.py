"""Every layout, transport, schedule and mode has the loss and the gradients of one process."""

import pytest

from mlm_train.config.parallel import INTERLEAVED, ZERO_BUBBLE
from tests.parallel.layouts import MODES, Case
from tests.parallel.matrix import LAYOUTS, Layout, cases_of, further, pairs_of_choices
from tests.parallel.pairwise import ENGINES, case_of, pairs_of, pairwise, pool, together
from tests.parallel.pairwise import LAYOUTS as MIXED
from tests.parallel.table import failures, run_layout
from tests.ranks import run_on_ranks
from tests.zero_bubble import runs_here, skip_the_rest

SEQUENCE = {"tensor": 2, "sequence": True}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_with_one_process(layout: Layout) -> None:
    """Every pair of choices in as few cases as hold them, and all cases of layouts with four of a kind."""
    cases = pairs_of_choices(layout)
    results = run_layout(layout, cases)
    assert results and failures(results) == {}
    skip_the_rest(*cases.keys() - results.keys())


@pytest.mark.long
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if further(layout)], ids=str)
def test_parity_of_all_other_cases(layout: Layout) -> None:
    cases = further(layout)
    results = run_layout(layout, cases)
    assert failures(results) == {}
    skip_the_rest(*cases.keys() - results.keys())


def test_no_case_is_left_out() -> None:
    for layout in LAYOUTS:
        assert pairs_of_choices(layout) | further(layout) == cases_of(layout)


def test_the_matrix_covers_every_value_of_every_axis() -> None:
    covered: set[tuple[str, object]] = set()
    for layout in LAYOUTS:
        if layout.pipeline == 1:
            continue
        for case in cases_of(layout).values():
            count = case["train"]["global_batch_size"] // layout.data
            covered |= {(key, value) for key, value in case["parallel"].items() if key != "layers_per_stage"}
            covered |= {
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
        "engine": ("fsdp",),
    }.items():
        for value in values:
            assert (axis, value) in covered, (axis, value)


def test_all_pairs_of_choices_are_compared_or_rejected() -> None:
    """The config rejects exactly these pairs, whatever else is chosen; pairs with a layout follow."""
    candidates, rejected = pool()
    selected = [case for cases in pairwise().values() for case in cases.values()]
    choices = [*candidates, *together()]
    covered = set().union(*(pairs_of(choice) for choice in choices if case_of(choice) in selected))
    assert set().union(*map(pairs_of, candidates)) <= covered
    schedules = ("gpipe", "1f1b", "interleaved_1f1b", *ZERO_BUBBLE)
    expected = {(("schedule", schedule), ("engine", "ZeRO-3")) for schedule in schedules}
    expected |= {(("transport", name), ("engine", "ZeRO-3")) for name in ("broadcast", "relay", "replicate")}
    expected |= {(("stages", which), ("engine", "ZeRO-3")) for which in ("longest first", "longest last")}
    tables = [mode for mode in MODES if "table" in mode]
    expected |= {(("mode", mode), ("engine", "ZeRO-3")) for mode in tables}
    expected |= {(("mode", mode), ("transport", name)) for mode in tables for name in ("relay", "replicate")}
    owned = [mode for mode in MODES if "owned" in mode]
    expected |= {(("mode", mode), ("engine", name)) for mode in owned for name in ENGINES if name != "fsdp"}
    for schedule in ZERO_BUBBLE:
        expected.add((("schedule", schedule), ("recompute", "full")))
        expected.add((("transport", "replicate"), ("schedule", schedule)))
        expected |= {(("mode", mode), ("schedule", schedule)) for mode in tables if "layer" in mode}
    expected |= {(("schedule", name), ("micro_batches", 5)) for name in INTERLEAVED}
    expected.add((("schedule", "dualpipe_v"), ("micro_batches", 3)))
    assert {pair for pair in rejected if pair[0][0] != "layout"} == expected
    pipelines = {layout for layout in MIXED if layout.pipeline > 1}
    assert {pair for pair in rejected if pair[0][0] == "layout"} == {
        (("layout", layout), ("engine", "ZeRO-3")) for layout in pipelines
    }


@pytest.mark.parametrize(
    "parallel",
    [
        SEQUENCE,
        {"engine": "fsdp", "reduce_dtype": "bf16"},
        *(
            pytest.param(parallel, marks=pytest.mark.long)
            for parallel in (
                {},
                {"tensor": 2, "zero_stage": 0},
                {"pipeline": 2, "zero_stage": 2},
                {"zero_stage": 3},
                {"engine": "fsdp"},
            )
        ),
    ],
    ids=str,
)
def test_bf16_is_no_further_from_fp32_than_one_process(parallel: Case) -> None:
    modes = [
        mode
        for mode in MODES
        if "layer" not in mode
        and (parallel.get("zero_stage") != 3 or "table" not in mode)
        and ("engine" in parallel or "owned" not in mode)
    ]
    if "engine" in parallel:
        modes.append("table owned, bf16 gradient rows")
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
    assert distance["alone"] > 1e-4, "the single process must really compute in bf16"
    for mode in modes:
        assert distance[mode] <= 1.25 * distance["alone"], (parallel, distance)


# A plausible mistake in the code -> a layout of four ranks in which the suite must detect it.
MISTAKES: dict[str, dict] = {
    "labels counted on each rank alone": {},
    "norms not summed over positions": SEQUENCE,
    "norms not summed in each pass": SEQUENCE | {"zero_stage": 2},
    "tied heads not summed": {"pipeline": 2},
    "rows of x0 not summed over positions": SEQUENCE | {"pipeline": 2},
    "gradients scaled by the schedule": {"pipeline": 2},
    "lookups without anchors": {"pipeline": 2, "pipeline_schedule": "zbv"},
    "gradients of shared rows not sent": {},
    "gradients of owned rows not sent": {"engine": "fsdp"},
    "gradients of a layer's owners not summed": {"engine": "fsdp"},
}
MISTAKEN_MODES = {
    "lookups without anchors": "table",
    "gradients of shared rows not sent": "table shared",
    "gradients of owned rows not sent": "table owned",
    "gradients of a layer's owners not summed": "table owned",
}


def test_the_suite_detects_mistakes() -> None:
    """Each shows in the loss, the norm or a gradient, a thousand times above the limits."""
    cases = {}
    runnable = {name: case for name, case in MISTAKES.items() if runs_here(case.get("pipeline_schedule"))}
    for mistake, parallel in runnable.items():
        layers = 3 if "owners" in mistake else 4  # fewer than ranks: each has several
        model = {"kind": "memory", "tie_word_embeddings": "tied" in mistake, "num_hidden_layers": layers}
        mode = MISTAKEN_MODES.get(mistake, "unique")
        cases[mistake] = {"model": model, "mode": mode, "micro_batch": 2, "parallel": parallel}
    errors = run_on_ranks("tests.parallel.parity_cases:run_mistaken", 4, cases=cases)
    for mistake, error in errors.items():
        assert max(error["gradients"], error["norm"], error["loss"]) > 1e-2, (mistake, error)
    skip_the_rest(*MISTAKES.keys() - runnable.keys())


def test_a_lookup_runs_backward_once_per_micro_batch() -> None:
    """Shape inference in the pipeline, or an evaluation, would run it more often, on undefined values."""
    counts = run_on_ranks(
        "tests.parallel.parity_cases:count_lookups", 2, model={"kind": "memory"}, parallel={"pipeline": 2}
    )
    assert counts == [4, 4, 8]  # eight sequences per step, two per micro-batch
