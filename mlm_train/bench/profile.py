"""`bench profile`: where the time of a training step's forward and backward passes goes, in one process.

The step is the trainer's own (parallel/pipeline/single_stage.py), with tables, without the optimizer; the
operations recorded by torch.profiler are summed by group.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from mlm_train.bench import report
from mlm_train.bench.built import SEED, build, step_config
from mlm_train.errors import UserError
from mlm_train.utils.arguments import refuse_below_one

ZIPF = 1.16  # frequency of the k-th id: k**-ZIPF, which gives 0.19 distinct ids per token at 16k, as in text
# Group -> parts of torch's operation names; an operation belongs to the first group that matches.
GROUPS = {
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
    "compiled elementwise": ("CompiledFxGraph",),
    "copies, casts, fills": ("copy", "fill_", "zero_", "aten::cat", "aten::clone", "aten::empty"),
    "lookups": ("aten::index", "aten::embedding", "searchsorted", "Lookup"),
    "elementwise and sums": ("aten::", "_HeadLoss"),
    "autograd, Python, the rest": ("",),
}


def bench_profile(args: argparse.Namespace) -> int:
    """Profile one step after two warm-up steps, print the groups, write the report. Returns 0."""
    _check(args)
    machine = report.machine()
    run, tokens, distinct = _step(args)
    for _ in range(2):
        run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiled.key_averages():
        group = next(group for group, parts in GROUPS.items() if any(part in event.key for part in parts))
        seconds[group] += event.self_cpu_time_total / 1e6
        calls[group] += event.count
    rows = [
        report.row(group, [seconds[group]], "s") | {"calls": calls[group]} for group in GROUPS if calls[group]
    ]
    started = time.perf_counter()
    run()
    figures = {
        "tokens": tokens,
        "distinct_ratio": distinct / tokens,
        "seconds_without_profiler": time.perf_counter() - started,
    }
    _show(args, rows, figures, machine)
    if args.json is not None:
        report.write_report(Path(args.json), machine, rows, figures)
    return 0


def _check(args: argparse.Namespace) -> None:
    sizes = ("layers", "hidden", "heads", "ffn", "vocabulary", "sequence", "sequences", "micro_batches")
    refuse_below_one(args, *sizes)
    if args.hidden % args.heads or args.hidden // args.heads % 2:
        raise UserError(
            f"--heads {args.heads}: must divide --hidden {args.hidden} into heads of an even size"
        )
    report.check_outputs(args)


def _step(args: argparse.Namespace) -> tuple[Any, int, int]:
    """A function that runs a step's micro-batches, the step's number of tokens and of distinct ids."""
    model = {
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "intermediate_size": args.ffn,
        "max_position_embeddings": args.sequence,
    }
    mode = None if args.mode == "base" else args.mode
    train = {"precision": args.precision, "compile": args.compile}
    config = step_config(model, mode, args.sequence, args.sequences, args.micro_batches, train)
    _, executor, _ = build(config)
    count = config.train.global_batch_size
    torch.manual_seed(SEED)
    odds = torch.arange(1, args.vocabulary + 1, dtype=torch.float64) ** -ZIPF
    ids = torch.multinomial(odds, count * args.sequence, replacement=True).view(count, args.sequence)
    batches = [(batch, batch) for batch in ids.split(args.sequences)]
    return lambda: executor.backward(batches, 1 / ids.numel()), ids.numel(), ids.unique().numel()


def _show(
    args: argparse.Namespace, rows: list[dict[str, Any]], figures: dict[str, float], machine: dict[str, Any]
) -> None:
    """Print the table of groups, the total, and the machine."""
    table = Table(title=f"{args.mode}{', compiled' if args.compile else ''}: seconds per micro-batch")
    for heading in ("what", "s", "share", "calls"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    total, count = sum(row["median"] for row in rows), args.micro_batches
    for row in sorted(rows, key=lambda row: -row["median"]):
        share, calls = f"{row['median'] / total:.1%}", f"{row['calls'] / count:,.0f}"
        table.add_row(row["name"], f"{row['median'] / count:.3f}", share, calls)
    table.add_row("total", f"{total / count:.3f}", "", "")
    wide = Console(width=110, soft_wrap=True)
    wide.print(table, soft_wrap=False)
    speed = figures["tokens"] / figures["seconds_without_profiler"]
    wide.print(
        f"without the profiler {speed:,.0f} tokens/s; {args.micro_batches} micro-batches of "
        f"{args.sequences} x {args.sequence} tokens, {args.precision}, "
        f"distinct ids / tokens {figures['distinct_ratio']:.3f}"
    )
    wide.print(report.describe(machine))
