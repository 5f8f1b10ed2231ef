"""What the ranks of the test of train.compile run."""

import torch
from torch._dynamo.utils import counters

from tests.parallel.parity_cases import run_case


def run_compiled(cases: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Errors of each case with compiled layers, the number of graphs, and of graph breaks."""
    results = {}
    for name, case in cases.items():
        torch.compiler.reset()
        counters.clear()
        train = case.get("train", {}) | {"compile": True}
        results[name] = run_case(**case | {"train": train})
        results[name] |= {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": len(counters["graph_break"]),
        }
    return results
