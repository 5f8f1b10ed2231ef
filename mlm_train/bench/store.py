"""`bench store`: rows of a ToL by tier, reads in flight and cache, without a model."""

import argparse
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mlm_train.bench import report
from mlm_train.data.prepared import PreparedData
from mlm_train.errors import UserError
from mlm_train.tol.format.index import TolIndex
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.serve.frequency import most_frequent
from mlm_train.tol.serve.source import open_store
from mlm_train.tol.serve.store import RowStore, StoreOptions
from mlm_train.utils.arguments import refuse_below_one
from mlm_train.utils.files import write_figure

SEED = 1234
DISK, DIRECT = StoreOptions("disk"), StoreOptions("disk", direct=True)
TIERS = {
    "resident": StoreOptions("resident"),
    "shared": StoreOptions("shared"),
    "disk": DISK,
    "direct": DIRECT,
}
DEPTHS = (1, 4, 16, 64, 128)
SHARES = (0.001, 0.01, 0.1)  # of the vocabulary, in the cache
ADMISSIONS = ("frequent", "lowest_ids", "recent")
CPU = torch.device("cpu")

Row = dict[str, Any]


def bench_store(args: argparse.Namespace) -> int:
    """Measure, print and write the report."""
    refuse_below_one(args, "runs", "rows", "tokens")
    report.check_outputs(args)
    folder, index, data = Path(args.tol), read_index(args.tol), PreparedData.open(args.data)
    if data.vocab_size > index.vocab_size:
        raise UserError(f"{args.data} has {data.vocab_size} ids and {folder} {index.vocab_size} rows")
    machine = report.machine()
    rows = [
        *_reads(folder, index, min(args.rows, index.vocab_size), args.runs),
        *_hits(folder, index, data, args),
    ]
    ratios = _ratios({row["name"]: row["median"] for row in rows})
    _show(rows, ratios)
    notes = [f"rows of {index.row_bytes:,} bytes", "cold: the files' pages were dropped from the page cache"]
    if args.json is not None:
        report.write_report(Path(args.json), machine, rows, ratios, notes)
    if args.plot is not None:
        _plot(rows, Path(args.plot))
    return 0


def _reads(folder: Path, index: TolIndex, count: int, runs: int) -> list[Row]:
    """Seconds to have all of `count` rows, and of one: by tier, reads in flight, order and page cache."""
    options = TIERS | {f"direct_depth{depth}": replace(DIRECT, depth=depth) for depth in DEPTHS}
    stores = {name: open_store(folder, index, option, CPU) for name, option in options.items()}
    generator = torch.Generator().manual_seed(SEED)
    seconds: dict[str, list[float]] = {}
    for _ in track(range(runs), "reading", console=Console(stderr=True), transient=True):
        drawn = torch.randperm(index.vocab_size, generator=generator)
        start = int(drawn[0]) % (index.vocab_size - count + 1)
        asked = {
            "random": drawn[:count].sort().values,
            "sequential": torch.arange(start, start + count),
            "one": drawn[:1],
        }
        for name, store in stores.items():
            for order, ids in asked.items():
                _drop_pages(folder, index)
                for state in ("cold", "warm"):
                    taken = _timed(store, [ids], index)
                    seconds.setdefault(f"read.{name}.{order}.{state}", []).append(taken)
    for store in stores.values():
        store.close()
    return [report.row(name, values, "s") for name, values in seconds.items()]


def _hits(folder: Path, index: TolIndex, data: PreparedData, args: argparse.Namespace) -> list[Row]:
    """Hit rates of the validation text's tokens, one after the other, as in decoding."""
    text = torch.from_numpy(np.array(data.split("validation").tokens[: args.tokens], dtype=np.int64))
    hot = {"frequent": most_frequent(data), "lowest_ids": range(index.vocab_size)}
    rows = []
    kinds = [(share, admission) for share in SHARES for admission in ADMISSIONS]
    for share, admission in track(kinds, "hit rates", console=Console(stderr=True), transient=True):
        room = max(1, int(share * index.vocab_size)) * index.row_bytes
        store = open_store(folder, index, replace(DISK, cache_bytes=room, hot=hot.get(admission)), CPU)
        taken = _timed(store, text.split(1), index)
        counters = store.counters
        name = f"hits.{admission}.{share:g}"
        rows.append(report.row(f"{name}.rate", [counters.hits / counters.distinct], "of rows"))
        rows.append(report.row(f"{name}.per_token", [taken / len(text)], "s"))
        store.close()
    return rows


def _timed(store: RowStore, asked: Sequence[Tensor], index: TolIndex) -> float:
    """Seconds to have all columns of some rows after others, layer by layer, as a model takes them."""
    layers = len(index.layers)
    edges = [layer * index.row_bytes // layers for layer in range(layers + 1)]
    started = time.perf_counter()
    for ids in asked:
        rows = store.fetch(ids)
        for first, last in itertools.pairwise(edges):
            rows.columns(first, last)
    return time.perf_counter() - started


def _drop_pages(folder: Path, index: TolIndex) -> None:
    for partition in index.partitions:
        file = os.open(folder / partition.file, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _ratios(value: dict[str, float]) -> dict[str, float]:
    found = {
        "disk_over_shared_cold_random": value["read.direct.random.cold"] / value["read.shared.random.cold"],
        "disk_over_resident_cold_random": value["read.direct.random.cold"]
        / value["read.resident.random.cold"],
        "depth64_over_depth1": value["read.direct_depth64.random.cold"]
        / value["read.direct_depth1.random.cold"],
    }
    for share in SHARES:
        frequent, recent = (value[f"hits.{name}.{share:g}.rate"] for name in ("frequent", "recent"))
        found[f"frequent_over_recent_hits_{share:g}"] = frequent / max(recent, 1e-9)
    return found


def _show(rows: Sequence[Row], ratios: dict[str, float]) -> None:
    console = Console(width=110, soft_wrap=True)
    reads, hits = Table("read", "ms", "min", "max"), Table("cache", "value")
    for row in rows:
        if row["unit"] == "s" and row["name"].startswith("read"):
            figures = (f"{1e3 * row[key]:.2f}" for key in ("median", "min", "max"))
            reads.add_row(row["name"].removeprefix("read."), *figures)
        else:
            shown = f"{row['median']:.3f}" if row["unit"] == "of rows" else f"{1e3 * row['median']:.3f} ms"
            hits.add_row(row["name"].removeprefix("hits."), shown)
    console.print(reads, soft_wrap=False)
    console.print(hits, soft_wrap=False)
    for name, value in ratios.items():
        console.print(f"{name} = {value:.4g}")


def _plot(rows: Sequence[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    value = {row["name"]: row["median"] for row in rows}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2))
    depths = [1e3 * value[f"read.direct_depth{depth}.random.cold"] for depth in DEPTHS]
    left.loglog(DEPTHS, depths, "o-", base=2, label="disk, direct")
    for tier, style in (("shared", "--"), ("resident", ":")):
        left.axhline(1e3 * value[f"read.{tier}.random.cold"], linestyle=style, color="gray", label=tier)
    left.set_xlabel("reads in flight")
    left.set_ylabel("ms, cold random rows")
    for admission in ADMISSIONS:
        rates = [value[f"hits.{admission}.{share:g}.rate"] for share in SHARES]
        right.semilogx([100 * share for share in SHARES], rates, "o-", label=admission.replace("_", " "))
    right.set_xlabel("cache, % of the vocabulary")
    right.set_ylabel("hit rate")
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)
