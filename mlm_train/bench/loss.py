"""`bench loss`: peak memory and time of forward and backward through head and loss, plain and chunked.

Every run is a process of its own, the two methods alternating. Peak memory is the rise of the process's peak
resident set above its resident set before the run, when the head's weight exists and no gradient does; the
weight's gradient, which both methods leave behind, is subtracted.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mlm_train.bench import report
from mlm_train.errors import UserError
from mlm_train.model.loss import VocabRange, head_loss, loss_sums

METHODS = ("plain", "chunked")
Z_LOSS, SEED = 1e-6, 1234
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of loss and gradient norms
PLAIN_BYTES = 20  # measured bytes per logit of the plain method


def bench_loss(order: dict[str, Any], runs: int, json_file: str | None) -> int:
    """Measure, print and write the report. Returns 1 if the methods' losses or gradients differ, else 0.

    `order` has vocabulary, hidden, tokens, precision and chunk (None: the default).
    """
    _check(order, json_file)
    machine, console = report.machine(), Console(stderr=True)
    figures: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in track(range(runs), "measuring", console=console, transient=True):
        for method in METHODS:
            figures[method].append(_in_a_process(order | {"method": method}))
    rows = _rows(figures)
    medians = {row["name"]: row["median"] for row in rows}
    ratios = {
        "chunked_over_plain_peak_memory": medians["chunked.peak_memory"] / medians["plain.peak_memory"],
        "chunked_over_plain_speed": medians["plain.step"] / medians["chunked.step"],
        "chunked_over_plain_speed_by_processor_time": medians["plain.processor"]
        / medians["chunked.processor"],
    }
    alike = _alike(figures, TOLERANCE[order["precision"]])
    _show(order, rows, ratios, machine, alike)
    if json_file is not None:
        report.write_report(Path(json_file), machine, rows, ratios)
    return int(not alike)


def _check(order: dict[str, Any], json_file: str | None) -> None:
    for name in ("vocabulary", "hidden", "tokens", "chunk"):
        if order[name] is not None and order[name] < 1:
            raise UserError(f"--{name} {order[name]}: give at least 1")
    if json_file is not None:
        report.check_writable(Path(json_file))
    needed = order["vocabulary"] * (PLAIN_BYTES * order["tokens"] + 16 * order["hidden"])
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--tokens {order['tokens']}: the plain method needs about {needed / 2**30:.1f} GiB, but "
            f"{free / 2**30:.1f} are free; give fewer"
        )


def _in_a_process(order: dict[str, Any]) -> dict[str, float]:
    """The figures of one run, measured by `work` in a fresh process."""
    command = [sys.executable, "-m", "mlm_train", "bench", "loss", "--worker"]
    figures = report.by_worker(order, lambda file: subprocess.run([*command, file]).returncode)
    if isinstance(figures, int):
        raise UserError(f"the process of the {order['method']} method ended with code {figures}")
    return figures


def work(order_file: str) -> int:
    """Run in the process of one run; writes its figures beside `order_file`."""
    order = report.read_order(order_file)
    torch.manual_seed(SEED)
    weight = torch.empty(order["vocabulary"], order["hidden"]).normal_(std=0.02).requires_grad_()
    hidden = torch.randn(order["tokens"], order["hidden"]).requires_grad_()
    labels = torch.randint(0, order["vocabulary"], (order["tokens"],))
    few = min(8, order["tokens"])
    _run(order, hidden[:few], weight, labels[:few])  # warm-up: libraries load and choose kernels
    hidden.grad = weight.grad = None
    before = psutil.Process().memory_info().rss
    started, busy = time.perf_counter(), time.process_time()
    loss = _run(order, hidden, weight, labels)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert hidden.grad is not None and weight.grad is not None
    result = {
        "seconds": seconds,
        "processor": busy,
        "peak": peak - before - weight.grad.nbytes,
        "loss": loss,
        "hidden_norm": float(hidden.grad.norm()),
        "weight_norm": float(weight.grad.norm()),
    }
    report.write_result(order_file, result)
    return 0


def _run(order: dict[str, Any], hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """Run forward and backward. Returns the mean cross-entropy."""
    count = len(labels)
    precision = torch.autocast("cpu", dtype=torch.bfloat16, enabled=order["precision"] == "bf16")
    if order["method"] == "plain":
        with precision:
            logits = torch.nn.functional.linear(hidden, weight)
        sums = loss_sums(logits, labels)
        del logits
        ((sums.cross_entropy + Z_LOSS * sums.z) / count).backward()
        return sums.cross_entropy.item() / count
    with precision:
        objective, cross_entropy = head_loss(
            hidden,
            weight,
            labels,
            scale=1 / count,
            z_loss=Z_LOSS,
            vocabulary=VocabRange(0, len(weight)),
            chunk=order["chunk"],
        )
    objective.backward()
    return cross_entropy.item() / count


def _alike(figures: dict[str, list[dict[str, float]]], limit: float) -> bool:
    """Whether loss and gradient norms of all runs agree."""
    for name in ("loss", "hidden_norm", "weight_norm"):
        values = [run[name] for method in METHODS for run in figures[method]]
        if not all(abs(value - values[0]) <= limit * abs(values[0]) for value in values):  # NaN differs
            return False
    return True


def _rows(figures: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for method, runs in figures.items():
        rows.append(report.row(f"{method}.peak_memory", [run["peak"] for run in runs], "bytes"))
        rows.append(report.row(f"{method}.step", [run["seconds"] for run in runs], "s"))
        rows.append(report.row(f"{method}.processor", [run["processor"] for run in runs], "s"))
    return rows


def _show(
    order: dict[str, Any],
    rows: list[dict[str, Any]],
    ratios: dict[str, float],
    machine: dict[str, Any],
    alike: bool,
) -> None:
    """Print the table, ratios and machine."""
    table = Table(title="head and loss, forward and backward")
    for heading in ("figure", "unit", "median", "min", "max"):
        table.add_column(heading, justify="left" if heading in ("figure", "unit") else "right")
    for row in rows:
        memory = row["unit"] == "bytes"
        shown = [
            f"{row[key] / 2**20:,.0f}" if memory else f"{row[key]:.2f}" for key in ("median", "min", "max")
        ]
        table.add_row(row["name"], "MiB" if memory else row["unit"], *shown)
    wide = Console(width=110, soft_wrap=True)
    wide.print(table, soft_wrap=False)
    for name, ratio in ratios.items():
        wide.print(f"{name}: {ratio:.3f}")
    chunk = f"chunks of {order['chunk']} tokens" if order["chunk"] else "the default chunk"
    wide.print(
        f"vocabulary {order['vocabulary']:,}, hidden {order['hidden']:,}, {order['tokens']:,} tokens, "
        f"{order['precision']}, {chunk}; alternating runs, each in a process of its own"
    )
    wide.print(report.describe(machine))
    if not alike:
        wide.print("[bold red]the two methods' losses or gradients differ")
