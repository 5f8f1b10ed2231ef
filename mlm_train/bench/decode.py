"""`bench decode`: what a token costs in time and memory, by kind, table and tier (the paper's table 6)."""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlm_train.bench import decode_models as models
from mlm_train.bench import report
from mlm_train.bench.decode_ratios import ratios_of
from mlm_train.bench.random_table import write_random_table
from mlm_train.config import ModelConfig
from mlm_train.data.prepared import PreparedData
from mlm_train.errors import UserError
from mlm_train.tol.format.schemes import Scheme
from mlm_train.utils.arguments import refuse_below_one
from mlm_train.utils.files import write_figure
from mlm_train.utils.units import in_units

SCHEMES = {
    "bfloat16": Scheme(dtype="bfloat16"),
    "int8": Scheme(dtype="int8", group_size=64),
    "int4": Scheme(dtype="int4", group_size=64),
}
TEXT = 50_000  # tokens

Row = dict[str, Any]


def bench_decode(args: argparse.Namespace) -> int:
    """Measure, print and write the report. Returns exit code 0."""
    _check(args)
    data = PreparedData.open(args.data)
    config = models.configs(args.shape, args.context)["memory"]
    ids = np.array(data.split("validation").tokens[:TEXT], dtype=np.int64) % config.vocab_size
    machine, console = report.machine(), Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=args.work, prefix="bench-decode-") as folder:
        work, tables = Path(folder), {}
        _check_room(work, config)
        rows = _resident(args, ids.tolist(), work, console)
        for name, scheme in SCHEMES.items():
            console.print(f"writing a random table, {name}")
            tables[name] = str(write_random_table(work / name, config, scheme))
        order = {
            "shape": args.shape,
            "tables": tables,
            "ids": ids.tolist(),
            "context": args.context,
            "steps": args.steps,
            "runs": args.runs,
            "batches": args.batches,
            "prefills": args.prefills,
            "hf": not args.skip_hf,
            "compile": not args.skip_compile,
        }
        rows += _worker(order)["rows"]
    ratios = ratios_of({row["name"]: row for row in rows}, args.shape)
    _show(rows, ratios)
    notes = [
        f"a step follows {args.context} tokens of random keys and values, with the ids of a text",
        "weights.*: the matrix-vector products of a token alone",
        "resident.*: private memory, at its peak, less that after the imports",
    ]
    if args.json is not None:
        report.write_report(Path(args.json), machine, rows, ratios, notes)
    if args.plot is not None:
        _plot(rows, Path(args.plot))
    return 0


def _check(args: argparse.Namespace) -> None:
    refuse_below_one(args, "steps", "runs", "context", "batches", "prefills")
    if args.context < 2:
        raise UserError(f"--context {args.context}: give at least 2, a prompt and a new token")
    vocabulary = models.SHAPES[args.shape]["fields"]["vocab_size"]
    if max(args.prefills) > vocabulary:
        raise UserError(f"--prefills {max(args.prefills)}: prompts of distinct ids have at most {vocabulary}")
    if not args.skip_hf and importlib.util.find_spec("transformers") is None:
        raise UserError("transformers is not installed: pip install 'mlm-train[hf]', or give --skip-hf")
    if 1 not in args.batches:
        raise UserError("--batches: 1 must be among them, which the ratios are of")
    report.check_outputs(args)


def _check_room(work: Path, config: ModelConfig) -> None:
    """Raise a UserError where the tables, which are the most that is there at once, would not fit."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    row = sum(scheme.bytes(hidden) for scheme in SCHEMES.values()) * layers
    needed, free = row * config.vocab_size, shutil.disk_usage(work).free
    if free < needed:
        raise UserError(f"--work has {in_units(free)} free and the tables need {in_units(needed)}")


def _resident(args: argparse.Namespace, ids: list[int], work: Path, console: Console) -> list[Row]:
    """Peak memory of each kind, loaded from an export that is written for it and removed.

    All but base read FFN-M and the embedding from a table on disk.
    """
    from mlm_train.bench.decode_resident import write_export

    rows = []
    kinds = models.configs(args.shape, args.context)
    table = write_random_table(work / "embeddings", kinds["memory"], SCHEMES["bfloat16"], "bfloat16")
    for kind, config in kinds.items():
        console.print(f"memory of {kind}")
        write_export(work / kind, config)
        tol = None if kind == "base" else str(table)
        prompt = ids[: max(1, args.context * 15 // 16)]
        found = _worker(
            {
                "resident": True,
                "model": str(work / kind),
                "tol": tol,
                "prompt": prompt,
                "context": args.context,
            }
        )
        rows.append(report.row(f"resident.{kind}", [found["bytes"]], "bytes"))
        shutil.rmtree(work / kind)
    shutil.rmtree(table)
    return rows


def _worker(order: dict[str, Any]) -> dict[str, Any]:
    """The result of a process of its own: memory and threads of one measurement do not touch another's."""

    def start(file: str) -> int:
        command = [sys.executable, "-m", "mlm_train", "bench", "decode", "--worker", file]
        return subprocess.run(command, check=False).returncode

    found = report.by_worker(order, start)
    if isinstance(found, int):
        raise UserError(f"the process of a measurement ended with code {found}")
    return found


def work(order_file: str) -> int:
    """A worker: time or memory."""
    if "resident" in report.read_order(order_file):
        from mlm_train.bench import decode_resident

        return decode_resident.work(order_file)
    from mlm_train.bench import decode_time

    return decode_time.work(order_file)


def _show(rows: Sequence[Row], ratios: dict[str, float]) -> None:
    console = Console(width=110, soft_wrap=True)
    table = Table("measurement", "median", "min", "max", "p95", "unit")
    for row in rows:
        scale, unit = (2**20, "MiB") if row["unit"] == "bytes" else (1, row["unit"])
        figures = (
            f"{row[key] / scale:,.1f}" if key in row else "" for key in ("median", "min", "max", "p95")
        )
        table.add_row(row["name"], *figures, unit)
    console.print(table, soft_wrap=False)
    for name, value in ratios.items():
        console.print(f"{name} = {value:.4g}")


def _plot(rows: Sequence[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    prefix = "decode.batch1."
    value = {row["name"]: row["median"] for row in rows}
    names = [name for name in value if name.startswith(prefix) and ".weights." not in name]
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(names) + 1))
    places = range(len(names))
    axes.barh(places, [value[name] for name in names])
    for place, name in zip(places, names, strict=True):
        limit = value.get(f"{prefix}weights.{name.removeprefix(prefix).split('.')[0]}")
        if limit is not None:
            axes.plot([limit, limit], [place - 0.4, place + 0.4], "k-")
    axes.set_yticks(places, [name.removeprefix(prefix) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("ms per token; line: its matrix-vector products alone")
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)
