"""The FSDP engine in each kind of layout against one process in float64."""

import pytest

from tests.parallel.table import LIMITS
from tests.ranks import run_on_ranks
from tests.zero_bubble import runs_here, skip_the_rest

MEMORY, BASE = ({"kind": kind, "num_hidden_layers": 4} for kind in ("memory", "base"))
FLEX = {"kind": "flex", "flex_beta": 2, "num_hidden_layers": 4}
FSDP = {"engine": "fsdp"}
PP2 = FSDP | {"pipeline": 2}
CASES: dict[int, dict[str, dict]] = {
    1: {"alone": {"model": MEMORY, "mode": "table", "micro_batch": 2, "parallel": FSDP}},
    2: {
        "DP2 per_token": {"model": MEMORY, "mode": "per_token", "micro_batch": 2, "parallel": FSDP},
        "DP2 unique": {
            "model": FLEX | {"flex_beta": 2},
            "mode": "unique",
            "micro_batch": 1,
            "parallel": FSDP,
        },
        "DP2 table": {"model": MEMORY, "mode": "table", "micro_batch": 1, "parallel": FSDP},
        "DP2 base": {"model": BASE, "mode": None, "micro_batch": 2, "parallel": FSDP},
        "TP2": {"model": MEMORY, "mode": "unique", "micro_batch": 2, "parallel": FSDP | {"tensor": 2}},
        "PP2": {"model": MEMORY, "mode": "table", "micro_batch": 1, "parallel": PP2},
    },
    4: {
        "TP2 DP2, SP": {
            "model": MEMORY,
            "mode": "table",
            "micro_batch": 2,
            "parallel": FSDP | {"tensor": 2, "sequence": True},
        },
        "HSDP": {
            "model": FLEX,
            "mode": "unique",
            "micro_batch": 1,
            "parallel": FSDP | {"replicate": 2, "reduce_each_micro_batch": True},
        },
        "PP2 DP2 1f1b": {"model": MEMORY, "mode": "unique", "micro_batch": 1, "parallel": PP2},
        "PP2 DP2 zbv": {
            "model": MEMORY,
            "mode": "table",
            "micro_batch": 1,
            "parallel": PP2 | {"pipeline_schedule": "zbv"},
        },
        "PP2 DP2 interleaved": {
            "model": BASE,
            "mode": None,
            "micro_batch": 1,
            "parallel": PP2 | {"pipeline_schedule": "interleaved_1f1b", "virtual_stages": 2},
        },
    },
}


@pytest.mark.parametrize("ranks", CASES)
def test_fsdp_equals_one_process(ranks: int) -> None:
    cases = {
        name: case
        for name, case in CASES[ranks].items()
        if runs_here(case["parallel"].get("pipeline_schedule"))
    }
    results = run_on_ranks("tests.parallel.parity_cases:run_cases", ranks, cases=list(cases.values()))
    for name, error in zip(cases, results, strict=True):
        assert all(error[key] <= limit for key, limit in LIMITS.items()), (name, error)
    skip_the_rest(*CASES[ranks].keys() - cases.keys())


def test_nothing_waits_for_the_device_before_a_step_is_over() -> None:
    """Then the step's results are read at once."""
    modes = [None, "per_token", "unique", "table", "table shared", "table owned", "table of a layer owned"]
    found = run_on_ranks("tests.parallel.sync_cases:count_waits", 2, modes=modes)
    assert found == [{}] * len(modes), dict(zip(modes, found, strict=True))
