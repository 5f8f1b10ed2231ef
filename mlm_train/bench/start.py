"""`bench start`: what rank 0 of a world that is not there does until it can train."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlm_train.bench import report
from mlm_train.config import load_config
from mlm_train.train.start_times import StartTimes
from mlm_train.utils.arguments import refuse_below_one

PER_NODE = 8


def bench_start(args: argparse.Namespace) -> int:
    """Start as often as asked, print and write the report."""
    refuse_below_one(args, "runs", "world")
    report.check_outputs(args)
    load_config(args.config, args.overrides)  # a mistake is one line, before any start
    machine = report.machine()
    found: list[dict[str, Any]] = []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [*args.overrides, f"train.output={folder}/run"]
            order = {"config": args.config, "overrides": overrides, "world": args.world}
            outcome = report.by_worker(order, _start)
        if isinstance(outcome, int):
            return outcome  # it has said why
        found.append(outcome)
    rows = [
        report.row(f"start.{part}", [run["seconds"][part] for run in found], "s")
        for part in found[0]["seconds"]
    ]
    own = [sum(run["seconds"].values()) - run["seconds"]["imports"] for run in found]
    rows += [
        report.row("start.without_imports", own, "s"),
        report.row("start.new_groups", [run["groups"] for run in found], "calls"),
        report.row("start.modules", [run["modules"] for run in found], "count"),
    ]
    _show(rows, args.world)
    notes = [f"rank 0 of {args.world} ranks, torch's fake process group: nothing was sent to anyone"]
    if args.json is not None:
        report.write_report(Path(args.json), machine, rows, {}, notes)
    return 0


def _start(order_file: str) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "mlm_train", "bench", "start", "--worker", order_file]
    return subprocess.run(command, check=False).returncode


def work(order_file: str) -> int:
    """In a process of its own: start as ordered; write what it took beside `order_file`."""
    order = report.read_order(order_file)
    world = order["world"]
    os.environ |= {"WORLD_SIZE": str(world), "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["LOCAL_WORLD_SIZE"] = str(min(world, PER_NODE))
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from mlm_train.train.preflight import preflight
    from mlm_train.train.setup import opened_run

    times = StartTimes()
    times.done("imports")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the status store
    os.environ["MASTER_PORT"] = str(store.port)
    config = load_config(order["config"], order["overrides"])
    data = preflight(config, world, min(world, PER_NODE))
    times.done("checks")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    with opened_run(config, data, times):
        result = {"seconds": times.seconds, "groups": _groups(), "modules": len(sys.modules)}
        report.write_result(order_file, result)
        sys.stdout.flush()
        os._exit(0)  # the others, who are not there, will not end with it


def _groups() -> int:
    """Process groups that this rank had torch make, its own and others'."""
    from torch.distributed import distributed_c10d

    return int(distributed_c10d._world.group_count)


def _show(rows: list[dict[str, Any]], world: int) -> None:
    table = Table(title=f"start of rank 0 of {world:,}")
    for heading in ("part", "median", "min", "max", "unit"):
        table.add_column(heading, justify="left" if heading in ("part", "unit") else "right")
    for row in rows:
        figures = [f"{row[name]:,.2f}".removesuffix(".00") for name in ("median", "min", "max")]
        table.add_row(row["name"].removeprefix("start."), *figures, row["unit"])
    Console(width=100).print(table)
