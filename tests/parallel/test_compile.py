"""Compiled layers in parallel layouts against one process in float64."""

import pytest

from tests.parallel.table import LIMITS
from tests.ranks import run_on_ranks

CASES: dict[str, dict] = {
    "sequence parallel": {
        "model": {"kind": "memory", "num_hidden_layers": 2},
        "mode": "table",
        "micro_batch": 4,
        "parallel": {"tensor": 2, "sequence": True},
    },
    "tensor parallel": {
        "model": {"kind": "memory", "num_hidden_layers": 1},
        "mode": "per_token",
        "micro_batch": 4,
        "parallel": {"tensor": 2},
    },
    "pipeline": {
        "model": {"kind": "flex", "flex_beta": 2, "num_hidden_layers": 3},
        "mode": "unique",
        "micro_batch": 2,
        "parallel": {"pipeline": 2, "zero_stage": 2},
        "train": {"activation_checkpointing": ["full", "selective"], "deterministic": True},
    },
}


@pytest.mark.parametrize(
    "names",
    [("sequence parallel", "pipeline"), pytest.param(("tensor parallel",), marks=pytest.mark.long)],
    ids=", ".join,
)
def test_gradients_equal_those_of_one_process(names: tuple[str, ...]) -> None:
    """Two ranks; no graph breaks, collectives included."""
    cases = {name: CASES[name] for name in names}
    results = run_on_ranks("tests.parallel.compile_cases:run_compiled", 2, cases=cases)
    for name, error in results.items():
        assert error["breaks"] == 0 and error["graphs"] <= 8, (name, error)
        assert all(error[key] <= limit for key, limit in LIMITS.items()), (name, error)
