"""Separate documents, in parallel layouts, against documents that are run one at a time in one process."""

from tests.parallel.table import LIMITS, has_schedule
from tests.ranks import run_on_ranks
from tests.zero_bubble import skip_the_rest

MEMORY = {"kind": "memory", "num_hidden_layers": 2}
FLEX = {"kind": "flex", "flex_beta": 2, "num_hidden_layers": 4}
CASES: dict[str, dict] = {
    "data": {"model": MEMORY, "mode": "table", "micro_batch": 2},
    "data, ZeRO-3": {"model": MEMORY, "mode": "unique", "micro_batch": 2, "parallel": {"zero_stage": 3}},
    "tensor": {"model": MEMORY, "mode": "unique", "micro_batch": 4, "parallel": {"tensor": 2}},
    "sequence, full recomputation": {
        "model": MEMORY,
        "mode": "table",
        "micro_batch": 4,
        "parallel": {"tensor": 2, "sequence": True},
        "train": {"activation_checkpointing": "full"},
    },
    "pipeline": {"model": FLEX, "mode": "unique", "micro_batch": 2, "parallel": {"pipeline": 2}},
    "zero-bubble pipeline, selective recomputation": {
        "model": FLEX,
        "mode": "table",
        "micro_batch": 2,
        "parallel": {"pipeline": 2, "pipeline_schedule": "zbv"},
        "train": {"activation_checkpointing": "selective"},
    },
    "pipeline, compiled": {
        "model": {"kind": "base", "num_hidden_layers": 2},
        "mode": None,
        "micro_batch": 2,
        "parallel": {"pipeline": 2},
        "train": {"compile": True},
    },
}


def test_gradients_equal_those_of_documents_run_alone() -> None:
    runnable = {name: case for name, case in CASES.items() if has_schedule(case)}
    results = run_on_ranks("tests.parallel.document_cases:run_separated", 2, cases=runnable)
    for name, error in results.items():
        assert all(error[key] <= limit for key, limit in LIMITS.items()), (name, error)
    skip_the_rest(*CASES.keys() - runnable.keys())
