"""`bench checkpoint`: what saves and loads cost, beside plain files and copies of as many bytes.

One process, then several that share the state (checkpoint_ranks.py).
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlm_train.bench import report
from mlm_train.errors import UserError
from mlm_train.parallel.launch.launcher import launch_ranks
from mlm_train.utils.arguments import refuse_below_one

GIB = 2**30
Values = dict[str, list[float]]  # figure -> its value in each turn
UNITS = {"copied": "bytes", "written": "bytes", "read": "bytes", "opens": "files", "cached": "fraction"}
WITHOUT_FILE = ("copy", "stall", "stall_cpu", "step", "step_meanwhile")  # seconds without a bandwidth
# Name of a ratio -> the figures above and below, of one process.
ALONE = {
    "stall_over_copy": ("stall", "copy"),
    "stall_over_save": ("stall", "save"),
    "save_bandwidth_over_plain": ("plain_write", "save"),
    "save_bandwidth_over_plain_direct": ("plain_write_direct", "save"),
    "background_over_foreground": ("background_save", "save"),
    "load_bandwidth_over_plain": ("plain_read", "load_verified"),
    "load_bandwidth_over_plain_unverified": ("plain_read", "load"),
    "load_bandwidth_over_plain_cached": ("plain_read_cached", "load_verified_cached"),
    "step_meanwhile_over_step": ("step_meanwhile", "step"),
}
# The same for several processes over one.
SHARED = {
    "save_bytes_per_rank_{}_over_dp1": "written",
    "copied_bytes_per_rank_{}_over_dp1": "copied",
    "stall_{}_over_dp1": "stall",
    "stall_cpu_{}_over_dp1": "stall_cpu",  # of the rank with the most: falls even where ranks share cores
    "copy_{}_over_dp1": "copy",
    "opens_per_rank_{}_over_dp1": "opens",
}


def bench_checkpoint(args: argparse.Namespace) -> int:
    """Measure, print and write the report. Returns 0, or the exit code of ranks that failed."""
    _check(args)
    machine, console = report.machine(), Console(stderr=True)
    worlds: dict[int, dict[str, Any]] = {}
    for world in dict.fromkeys((1, args.ranks)):
        console.print(f"{world} process{'es' if world > 1 else ''}, {args.runs} turns")
        outcome = _launch(args, world)
        if isinstance(outcome, int):
            return outcome
        worlds[world] = outcome
    rows, ratios = _rows(worlds), _ratios(worlds)
    _show(worlds, rows, ratios, machine)
    if args.json is not None:
        report.write_report(Path(args.json), machine, rows, ratios)
    return 0


def _launch(args: argparse.Namespace, world: int) -> dict[str, Any] | int:
    """Launch ranks. Returns their result, or the exit code where they failed."""
    command = ["bench", "checkpoint", "--worker"]
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.folder) as folder:
        order = {"folder": folder, "gib": args.gib, "runs": args.runs, "world": world}
        return report.by_worker(order, lambda file: launch_ranks([*command, file], world))


def _check(args: argparse.Namespace) -> None:
    refuse_below_one(args, "runs", "ranks")
    if not 0 < args.gib < float("inf"):
        raise UserError(f"--gib {args.gib}: give more than 0")
    report.check_outputs(args)
    if not Path(args.folder).is_dir():
        raise UserError(f"--folder {args.folder}: name an existing folder")
    free = shutil.disk_usage(args.folder).free / GIB
    if free < 4 * args.gib:
        raise UserError(f"--folder {args.folder} has {free:.1f} GiB free, but {4 * args.gib:.1f} are needed")


def _rows(worlds: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Report rows; those of several processes begin with their number, and have the slowest rank's values."""
    return [
        report.row(name if world == 1 else f"dp{world}.{name}", values, _unit(name))
        for world, found in worlds.items()
        for name, values in found["values"].items()
    ]


def _unit(name: str) -> str:
    return UNITS.get(name.removesuffix("_verified"), "s")


def _ratios(worlds: dict[int, dict[str, Any]]) -> dict[str, float]:
    """Ratios of pairs of figures, as medians over turns."""
    alone: Values = worlds[1]["values"]
    ratios = {name: report.median_ratio(alone[above], alone[below]) for name, (above, below) in ALONE.items()}
    for world, found in worlds.items():
        if world > 1:
            values: Values = found["values"]
            for name, figure in SHARED.items():
                ratios[name.format(f"dp{world}")] = report.median_ratio(values[figure], alone[figure])
            size = [found["bytes"]] * len(values["read"])
            ratios[f"load_bytes_over_model_dp{world}"] = report.median_ratio(values["read"], size)
            ratios[f"load_bytes_over_model_dp{world}_verified"] = report.median_ratio(
                values["read_verified"], size
            )
            ratios[f"stall_over_copy_dp{world}"] = report.median_ratio(values["stall"], values["copy"])
    return ratios


def _show(
    worlds: dict[int, dict[str, Any]],
    rows: list[dict[str, Any]],
    ratios: dict[str, float],
    machine: dict[str, Any],
) -> None:
    """Print seconds, bandwidths and ratios."""
    size, parameters = worlds[1]["bytes"], worlds[1]["parameters"]
    title = f"{parameters / 1e6:.1f} M parameters, a checkpoint of {size / GIB:.2f} GiB"
    table = Table("what", "median", "min", "max", "", "GiB/s", title=title)
    for row in rows:
        is_time = row["unit"] == "s"
        figures = [f"{row[key]:.3f}" if is_time else f"{row[key]:,.4g}" for key in ("median", "min", "max")]
        moves = is_time and row["name"].rpartition(".")[2] not in WITHOUT_FILE
        table.add_row(
            row["name"], *figures, row["unit"], f"{size / GIB / row['median']:.2f}" if moves else ""
        )
    wide = Console(width=110, soft_wrap=True)
    wide.print(table, soft_wrap=False)
    for name, ratio in ratios.items():
        wide.print(f"{name}: {ratio:.3f}")
    wide.print(report.describe(machine))
