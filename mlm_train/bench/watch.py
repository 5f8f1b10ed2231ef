"""`bench watch`: what watching for hangs asks of the job's store in a world that is simulated."""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from mlm_train.bench import report
from mlm_train.errors import UserError
from mlm_train.utils.arguments import refuse_below_one

LIMIT = 5000  # operations per second that a run may ask of the store, in any second
SHOWN = 12  # lines of the report


def bench_watch(args: argparse.Namespace) -> int:
    """Simulate, print and write the report. Returns 1 where a second had more than LIMIT operations."""
    refuse_below_one(args, "world", "per_node", "timeout")
    report.check_outputs(args)
    if args.world % args.per_node or args.world < 3 * args.per_node:
        raise UserError(
            f"--world {args.world}: give a multiple of --per-node {args.per_node}, at least 3 times it"
        )
    needed = 3 * args.world + 1000
    allow_files(needed)
    import torch.distributed as dist

    machine = report.machine()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    order = {name: getattr(args, name) for name in ("world", "per_node", "timeout")}
    order |= {
        "port": store.port,
        "stopped": list(range(args.world - args.per_node, args.world)),
        "moving": False,
    }
    outcome = report.by_worker(order, _start)
    if isinstance(outcome, int):
        return outcome
    rows = [
        report.row("watch.start", [outcome["start"]], "operations"),
        report.row("watch.steady", outcome["steady"], "operations/s"),
        report.row("watch.hang", outcome["hang"], "operations/s"),
        report.row("watch.hang.total", [sum(outcome["hang"])], "operations"),
        report.row("watch.report", [outcome["report_seconds"]], "s"),
    ]
    console = Console(width=110, soft_wrap=True)
    for row in rows:
        figures = (
            f"median {row['median']:,.0f}, most {row['max']:,.0f}"
            if row["runs"] > 1
            else f"{row['median']:,.0f}"
        )
        console.print(f"{row['name']}: {figures} {row['unit']}", highlight=False)
    console.print("\n".join(outcome["report"].splitlines()[:SHOWN]), markup=False, highlight=False)
    worst = max(*outcome["steady"], *outcome["hang"])
    notes = [
        f"{args.world} ranks, {args.per_node} per node, in one process that share 32 "
        "connections to a real TCPStore; each speaker has one more",
        f"train.watchdog_timeout={args.timeout}; the last node stops, and all others wait for it",
        "a request that waits for a key counts twice, once more where nothing comes",
    ]
    if args.json is not None:
        report.write_report(Path(args.json), machine, rows, {"worst_over_limit": worst / LIMIT}, notes)
    return int(worst > LIMIT)


def allow_files(number: int) -> None:
    """Raise this process's limit of open files. Raises UserError where the system does not let it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        raise UserError(
            f"--world needs {number} open files, and this system allows {hard}: give a smaller one"
        )
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def _start(order_file: str) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "mlm_train", "bench", "watch", "--worker", order_file]
    return subprocess.run(command, check=False).returncode


def work(order_file: str) -> int:
    """In a process of its own: simulate as ordered; write what was counted beside `order_file`."""
    from mlm_train.bench.watch_world import simulate

    order: dict[str, Any] = report.read_order(order_file)
    report.write_result(order_file, simulate(**order))
    return 0
