"""`bench x0`: start ranks for each number of stages, compare traffic with the formulas, print and write."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlm_train.bench import report, x0_ranks
from mlm_train.data.prepared import PreparedData
from mlm_train.errors import UserError
from mlm_train.parallel.launch.launcher import launch_ranks

LOSSES_AGREE = 1e-6  # relative; fp32 sums in another order

Results = dict[int, dict[str, Any]]  # stages -> what x0_ranks wrote


def bench_x0(stages: Sequence[int], runs: int, schedule: str, data: str | None, json_file: str | None) -> int:
    """Measure, print and write the report. Returns 1 if a count differs from its formula or losses differ."""
    virtual = x0_ranks.VIRTUAL if schedule == "interleaved_1f1b" else 1
    maximum = x0_ranks.LAYERS // virtual
    for count in stages:
        if not 2 <= count <= maximum:
            raise UserError(f"--stages {count}: give 2 to {maximum}, the model has {x0_ranks.LAYERS} layers")
    if data is not None:
        PreparedData.open(data)
    if json_file is not None:
        report.check_writable(Path(json_file))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for every number of stages
    machine, results, console = report.machine(), {}, Console(stderr=True)
    for count in stages:
        console.print(f"{count} stages: {count} processes, {runs} timed steps per transport")
        outcome = _launch({"stages": count, "runs": runs, "schedule": schedule, "data": data})
        if isinstance(outcome, int):
            return outcome
        results[count] = outcome
    _show(results, schedule, data, machine)
    if json_file is not None:
        report.write_report(Path(json_file), machine, _rows(results), _ratios(results))
    return int(not all(map(_consistent, results.values())))


def _launch(order: dict[str, Any]) -> dict[str, Any] | int:
    """Launch ranks. Returns their result, or the exit code where they failed."""
    command = ["bench", "x0", "--worker"]
    return report.by_worker(order, lambda file: launch_ranks([*command, file], order["stages"]))


def _equal(figures: dict[str, Any]) -> bool:
    """Whether the traffic of every counted step equals the formula."""
    return bool(figures["counted"] == figures["formula"])


def _consistent(result: dict[str, Any]) -> bool:
    """Whether all counts equal their formulas and the transports' losses agree."""
    transports = result["transports"].values()
    steps = zip(*(figures["losses"] for figures in transports), strict=True)
    alike = all(max(losses) - min(losses) <= LOSSES_AGREE * max(losses) for losses in steps)
    return alike and all(map(_equal, transports))


def _milliseconds(figures: dict[str, Any]) -> list[float]:
    return [1000 * seconds for seconds in figures["seconds"]]


def _rows(results: Results) -> list[dict[str, Any]]:
    """Report rows per stage count and transport: bytes per step, counted and by formula, and milliseconds."""
    rows = []
    for count, result in results.items():
        rows.append(report.row(f"s{count}.without_x0.bytes_counted", result["without_x0"], "bytes/step"))
        for name, figures in result["transports"].items():
            start = f"s{count}.{name}"
            rows.append(report.row(f"{start}.bytes_counted", figures["counted"], "bytes/step"))
            rows.append(report.row(f"{start}.bytes_formula", figures["formula"], "bytes/step"))
            rows.append(report.row(f"{start}.step", _milliseconds(figures), "ms"))
    return rows


def _ratios(results: Results) -> dict[str, float]:
    """Ratios of broadcast to the other transports: bytes of all counted steps, median times."""
    ratios = {}
    for count, result in results.items():
        broadcast = result["transports"]["broadcast"]
        for name in ("relay", "replicate"):
            other = result["transports"][name]
            start = f"s{count}.broadcast_over_{name}"
            ratios[f"{start}_bytes"] = sum(broadcast["counted"]) / sum(other["counted"])
            medians = [statistics.median(figures["seconds"]) for figures in (broadcast, other)]
            ratios[f"{start}_time"] = medians[0] / medians[1]
    return ratios


def _show(results: Results, schedule: str, data: str | None, machine: dict[str, Any]) -> None:
    """Print the table; bytes are those of the first counted step."""
    table = Table(title=f"x0 between pipeline stages, {schedule}; bytes of the first counted step")
    for heading in ("stages", "transport", "bytes counted", "formula", "equal", "ms median", "min", "max"):
        table.add_column(heading, justify="left" if heading == "transport" else "right")
    for count, result in results.items():
        for name, figures in result["transports"].items():
            times = report.row(name, _milliseconds(figures), "ms")
            table.add_row(
                str(count),
                name,
                f"{figures['counted'][0]:,}",
                f"{figures['formula'][0]:,}",
                "yes" if _equal(figures) else "NO",
                *(f"{times[key]:.1f}" for key in ("median", "min", "max")),
            )
        table.add_section()
    wide = Console(width=110, soft_wrap=True)
    wide.print(table, soft_wrap=False)
    first = next(iter(results.values()))
    source = f"text of {data}" if data else "ids drawn from a Zipf distribution (k-th id: 1/k), not from text"
    wide.print(
        f"{x0_ranks.LAYERS} layers, hidden {x0_ranks.HIDDEN}, {first['tokens']} tokens per step in "
        f"{x0_ranks.MICRO_BATCHES} micro-batches, {first['distinct'][0]} distinct: {source}"
    )
    for count, result in results.items():
        wide.print(f"{count} stages move {result['without_x0'][0]:,} bytes per step without x0")
    wide.print(f"{report.describe(machine)}. Timed steps alternate; shared cores make times noisy.")
    if not all(map(_consistent, results.values())):
        wide.print("[bold red]a count differs from its formula, or the transports' losses differ")
