"""Documents kept apart, in every layout: gradients of documents run one by one in one process."""

from tests.parallel.table import LIMITS
from tests.ranks import run_on_ranks

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


def test_gradients_are_of_documents_alone() -> None:
    results = run_on_ranks("tests.parallel.document_cases:run_separated", 2, cases=CASES)
    for name, error in results.items():
        assert all(error[key] <= limit for key, limit in LIMITS.items()), (name, error)
