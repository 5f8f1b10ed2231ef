"""`make parity`: run the whole matrix, print its table, write docs/parity.md."""

import os
import time
from pathlib import Path

import torch

from tests.parallel.layouts import Case
from tests.parallel.matrix import LAYOUTS, Layout, cases_of
from tests.parallel.reference import LIMITS
from tests.ranks import ROOT, run_on_ranks
from tests.zero_bubble import runs_here

Errors = dict[str, float]

HEAD = """# Parity with one process
Written by `make parity`. Every case trains three AdamW steps with global gradient clipping and z-loss, on
micro-batches whose label masks differ widely by rank, and is compared with a plain float64 model on one
process without engine, micro-batches or parallelism. Errors are the largest of a layout's cases: loss and
gradient norm relative, over three steps; gradients of the first step and weights after the third as
||x - r|| / ||r|| of the worst logical tensor, where ||r|| is at least 1e-6 of the norm of all tensors. The
limits are 1e-5 for loss, norm and gradients, 1e-4 for weights; the column "alone" is the weights' error of
one plain fp32 process. The loss of an evaluation before the first step is compared too.

Cases are a product of the axes that concern x0 (kind, transport, mode of FFN-M, tied heads, micro-batches) in
most layouts; all cases together contain every pair of choices that the config accepts, of all axes: layout,
model, mode and placement, transport, schedule, sequence parallelism, engine, activation checkpointing, sizes
that the tensor ranks do not divide, loss chunks, micro-batch count, stages of unequal length.
tests/parallel/test_parity.py lists the pairs that the config rejects.

"""
FIGURES = ("loss", "norm", "gradients", "weights", "alone")


def failures(results: dict[str, Errors]) -> dict[str, Errors]:
    """The cases beyond the limits, or with a figure that is not a number."""
    return {
        name: error
        for name, error in results.items()
        if not all(error[key] <= limit for key, limit in LIMITS.items())
    }


def has_schedule(case: Case) -> bool:
    """Whether this torch has the case's schedule."""
    return runs_here(case.get("parallel", {}).get("pipeline_schedule"))


def run_layout(layout: Layout, cases: dict[str, Case]) -> dict[str, Errors]:
    """Case -> errors of a layout, one launch for all cases that this torch can run."""
    cases = {name: case for name, case in cases.items() if has_schedule(case)}
    results = run_on_ranks(
        "tests.parallel.parity_cases:run_cases", layout.world, timeout=900, cases=list(cases.values())
    )
    return dict(zip(cases, results, strict=True))


def main() -> None:
    """Run all layouts; print the table and write docs/parity.md."""
    started = time.perf_counter()
    lines = [f"| layout | processes | cases | {' | '.join(FIGURES)} |", "|---" * (3 + len(FIGURES)) + "|"]
    details: list[str] = []
    failed: dict[str, Errors] = {}
    for layout in LAYOUTS:
        results = run_layout(layout, cases_of(layout))
        failed |= {f"{layout}: {name}": error for name, error in failures(results).items()}
        worst = [max(error[key] for error in results.values()) for key in FIGURES]
        figures = " | ".join(f"{value:.1e}" for value in worst)
        lines.append(f"| {layout} | {layout.world} | {len(results)} | {figures} |")
        print(lines[-1], flush=True)
        details += ["", f"## {layout}", ""]
        details += [f"- {name}: gradients {error['gradients']:.1e}" for name, error in results.items()]
    if failed:
        raise SystemExit("\n".join(f"beyond the limits: {name} {errors}" for name, errors in failed.items()))
    minutes = (time.perf_counter() - started) / 60
    environment = (
        f"\nCPU, gloo, fp32, torch {torch.__version__}, {os.cpu_count()} cores: {minutes:.1f} minutes.\n"
    )
    text = HEAD + "\n".join(lines) + "\n" + environment + "\n".join(details) + "\n"
    (Path(ROOT) / "docs" / "parity.md").write_text(text, encoding="utf-8")
    print(environment.strip())


if __name__ == "__main__":
    main()
