"""A step that is non-finite on one rank is skipped on all, and the rank and the layer are named."""

import pytest

from tests.ranks import run_on_ranks
from tests.zero_bubble import runs_here, skip_the_rest

BASE, MEMORY = {"kind": "base"}, {"kind": "memory", "num_hidden_layers": 4}
LAYOUTS = {
    "ZeRO-0 DP4": {"parallel": {"zero_stage": 0}, "model": BASE},
    "ZeRO-1 DP4": {"parallel": {"zero_stage": 1}, "model": MEMORY},
    "ZeRO-2 DP4": {"parallel": {"zero_stage": 2}, "model": BASE},
    "ZeRO-3 DP4": {"parallel": {"zero_stage": 3}, "model": MEMORY},
    "TP2 DP2": {"parallel": {"tensor": 2, "sequence": True, "zero_stage": 1}, "model": MEMORY},
    "TP2 PP2, tables": {
        "parallel": {"tensor": 2, "pipeline": 2, "zero_stage": 1},
        "model": MEMORY,
        "memory": {"mode": "table"},
    },
    "PP2 V2 DP2": {
        "parallel": {
            "pipeline": 2,
            "virtual_stages": 2,
            "pipeline_schedule": "interleaved_1f1b",
            "zero_stage": 1,
        },
        "model": MEMORY,
    },
    "zbv DP2": {
        "parallel": {"pipeline": 2, "pipeline_schedule": "zbv", "zero_stage": 1},
        "model": BASE | {"num_hidden_layers": 4},
    },
    "FSDP DP4": {"parallel": {"engine": "fsdp"}, "model": MEMORY},
    "FSDP PP2 DP2": {
        "parallel": {"engine": "fsdp", "pipeline": 2},
        "model": MEMORY,
        "memory": {"mode": "table"},
    },
    "FSDP DP4, owned": {
        "parallel": {"engine": "fsdp"},
        "model": MEMORY | {"num_hidden_layers": 5},
        "memory": {"mode": "table", "placement": "owned"},
    },
}
KEEP_NO_GRADIENTS = (
    "ZeRO-2 DP4",
    "ZeRO-3 DP4",
    "FSDP DP4",
    "FSDP PP2 DP2",
    "FSDP DP4, owned",
)  # gradients are reduced in each pass
KINDS = ("gradient", "forward", "weight", "once")
CASES = [
    (layout, kind, number)
    for number, layout in enumerate(LAYOUTS)
    for kind in ("forward" if number % 2 else "gradient", KINDS[2 + number // 2 % 2])
]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], dict]:
    runnable = [case for case in CASES if runs_here(LAYOUTS[case[0]]["parallel"].get("pipeline_schedule"))]
    cases = [LAYOUTS[layout] | {"kind": kind, "guilty": 3 - guilty % 4} for layout, kind, guilty in runnable]
    found = run_on_ranks("tests.parallel.fault_cases:run", 4, cases=cases)
    return {case[:2]: outcome for case, outcome in zip(runnable, found, strict=True)}


@pytest.mark.parametrize(("layout", "kind", "number"), CASES)
def test_skipped_on_all_ranks_alike_and_named(
    outcomes: dict[tuple[str, str], dict], layout: str, kind: str, number: int
) -> None:
    if (layout, kind) not in outcomes:
        skip_the_rest(layout)
    outcome, rank = outcomes[layout, kind], 3 - number % 4
    fault = outcome["faults"][0]
    assert outcome["faults"] == [fault] * 4 and outcome["norms"] == ["inf"] * 4
    assert outcome["kept"] and outcome["went_on"] and outcome["good"] == [None] * 4
    layer = outcome["layer"]
    if kind == "forward":
        assert fault.startswith(f"loss nan; output of layer {layer} on rank {rank} ("), fault
    elif kind == "weight":
        assert f"; weight layers.{layer}.self_attn.o_proj.weight on rank {rank} (" in fault, fault
    elif layout in KEEP_NO_GRADIENTS:
        assert "the same samples give finite values now" in fault, fault
    elif kind == "gradient":
        assert fault.startswith("non-finite gradient; gradient of "), fault
        assert f"layers.{layer}.self_attn.o_proj.weight" in fault and f" on rank {rank} (" in fault, fault
    else:  # all gradients of the replica are non-finite
        assert fault.startswith("loss nan; gradient of lm_head.weight and "), fault
        replica = f"rank {rank} (" in fault
        assert replica or "pipeline" in LAYOUTS[layout]["parallel"], fault
