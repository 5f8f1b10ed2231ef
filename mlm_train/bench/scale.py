"""`bench scale`: a training step in worlds of up to 4096 ranks that are not there, counted on one machine."""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlm_train.bench import report
from mlm_train.bench.scale_plot import plot
from mlm_train.bench.scale_presets import SEQUENCE, SHAPES, WORLDS, World
from mlm_train.bench.scale_speed import measure_speed
from mlm_train.bench.scale_time import ASSUMED, Times, fsdp_times, owned_times
from mlm_train.data.prepared import PreparedData
from mlm_train.errors import UserError
from mlm_train.parallel.ffn_m.owned import GROUP_BYTES
from mlm_train.utils.arguments import refuse_below_one

GIB = 2**30

Counted = dict[str, Any]  # what scale_world.py wrote


def bench_scale(args: argparse.Namespace) -> int:
    """Count, print and write the report. Returns 1 where owned bytes differ from their formula."""
    data, shapes, tokens, json_file = args.data, args.shapes, args.tokens, args.json
    refuse_below_one(args, "runs")
    if args.speed is not None:
        PreparedData.open(args.speed)
    known = dict.fromkeys(world.shape for world in WORLDS)
    for shape in shapes or ():
        if shape not in SHAPES:
            raise UserError(f"--shapes {shape}: choose from {', '.join(known)}")
    report.check_outputs(args)
    folder = PreparedData.open(data)
    if len(folder.split("train").tokens) < tokens:
        raise UserError(f"--data {data} has less than a step of {tokens:,} tokens: prepare more text")
    worlds = [world for world in _worlds(shapes) if _fits(world, tokens)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    machine, console = report.machine(), Console(stderr=True)
    found: list[tuple[World, Counted]] = []
    for world in track(worlds, "counting", console=console):
        order = {"world": asdict(world), "data": data, "tokens": tokens, "sequence": _sequence(world)}
        outcome = report.by_worker(order, _start)
        if isinstance(outcome, int):
            raise UserError(f"{world.name}: its process ended with code {outcome}")
        found.append((world, outcome))
    rows, ratios = _rows(found), _ratios(found)
    predicted = _predicted(found, folder.vocab_size, tokens)
    rows += [
        report.row(f"{name}.predicted.{part}", [value], "s (arithmetic)")
        for name, times in predicted.items()
        for part, value in times._asdict().items()
    ]
    if args.speed is not None:
        timed, measured = measure_speed(args.speed, args.preset, args.runs)
        rows, ratios = rows + timed, ratios | measured
    show(found, ratios, predicted)
    notes = [
        f"{tokens:,} tokens per step, vocabulary {folder.vocab_size:,}, data {folder.fingerprint[:12]}",
        "nothing here was timed on a network: bytes are counted at the collectives' arguments",
        f"predicted seconds are arithmetic: {ASSUMED}, nothing overlaps",
    ]
    if json_file is not None:
        report.write_report(Path(json_file), machine, rows, ratios, notes)
    if args.plot is not None:
        plot(rows, ratios, Path(args.plot))
    exact = (value for name, value in ratios.items() if name.startswith("owned_bytes_over_formula"))
    return int(any(abs(value - 1) > 0.01 for value in exact))


def _worlds(shapes: Sequence[str] | None) -> list[World]:
    if shapes and "tiny" in shapes:
        return [
            World("tiny", 1, 1, 8, "owned"),
            World("tiny", 2, 2, 4, "owned"),
            World("tiny", 1, 1, 4, None),
        ]
    return [world for world in WORLDS if not shapes or world.shape in shapes]


def _sequence(world: World) -> int:
    return 64 if world.shape == "tiny" else SEQUENCE


def _fits(world: World, tokens: int) -> bool:
    """Whether the step has a micro-batch per stage on each data-parallel rank."""
    return tokens // _sequence(world) >= world.data * world.pipeline


def _start(order_file: str) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "mlm_train", "bench", "scale", "--worker", order_file]
    return subprocess.run(command, check=False).returncode


def _sum(counted: Counted, what: str, part: str) -> int:
    """Of the counted keys axis/operation/dtype that contain `part`."""
    return sum(value for key, value in counted[what].items() if part in key)


def ffn_m_parameters(world: World, counted: Counted) -> int:
    """Of the layers of a rank's stage."""
    shape, layers = SHAPES[world.shape], counted["stage_layers"]
    return int(layers * shape.hidden * (3 * shape.ffn + 1))


def dense_bytes(world: World, counted: Counted, per_parameter: int = 8) -> float:
    """What a rank would send for FFN-M's weights and gradients: 8 bytes for an fp32 gradient and weight."""
    return per_parameter * ffn_m_parameters(world, counted) / world.tensor


def _rows(found: Sequence[tuple[World, Counted]]) -> list[dict[str, Any]]:
    """Report rows per world: bytes by axis, operation and dtype, calls, state, seconds."""
    rows = []
    for world, counted in found:
        start = f"{world.name}.{world.placement or 'base'}"
        rows += [report.row(f"{start}.bytes.{k}", [v], "bytes/step") for k, v in counted["bytes"].items()]
        rows += [report.row(f"{start}.calls.{k}", [v], "calls/step") for k, v in counted["calls"].items()]
        rows += [report.row(f"{start}.state.{k}", [v], "bytes") for k, v in counted["state"].items()]
        formula = counted.get("formula", {})
        rows += [report.row(f"{start}.formula.{k}", [v], "bytes/step") for k, v in formula.items()]
        for name in ("distinct", "union", "micro_batches"):
            rows.append(report.row(f"{start}.{name}", [counted[name]], "count"))
        rows.append(report.row(f"{start}.plan", [counted["plan_seconds"]], "s"))
    return rows


def _ratios(found: Sequence[tuple[World, Counted]]) -> dict[str, float]:
    """What must hold (docs/scale.md)."""
    ratios = {}
    for world, counted in found:
        if world.placement is None:
            total = sum(size for part, size in counted["state"].items() if part != "copies")
            ratios[f"fsdp_state_over_ideal_{world.name}"] = total * world.ranks / counted["whole_state"]
            ratios[f"fsdp_unsharded_blocks_{world.name}"] = counted["unsharded_blocks"]
            continue
        sent, formula = _sum(counted, "bytes", "alltoall_base"), sum(counted["formula"].values())
        ratios[f"owned_bytes_over_formula_{world.name}"] = sent / formula
        ratios[f"owned_state_over_ideal_{world.name}"] = counted["state"]["ffn_m"] / (
            12 * ffn_m_parameters(world, counted) / (world.tensor * world.data)
        )
        ratios[f"owned_rows_over_share_{world.name}"] = counted["rows_over_share"]
        rows = counted["formula"]["rows"] + counted["formula"]["gradient_rows"]
        exchanges = _sum(counted, "calls", "alltoall_base") - 2 * (counted["formula"]["weights"] > 0)
        allowed = 2 + 2 * math.ceil(rows / GROUP_BYTES)
        ratios[f"exchanges_over_allowed_{world.name}"] = exchanges / allowed
        for per_parameter in (8, 6, 4):
            dense = dense_bytes(world, counted, per_parameter)
            name = f"owned_over_replicated_bytes_{world.name}_at_{per_parameter}_bytes"
            ratios[name] = sent / dense
    return ratios


def _predicted(found: Sequence[tuple[World, Counted]], vocabulary: int, tokens: int) -> dict[str, Times]:
    """Step times by world, with owned FFN-M and with FSDP alone."""
    times = {}
    for world, counted in found:
        if world.placement is None:
            continue
        config = world.config(vocabulary, tokens, _sequence(world))
        stage = world.tensor * world.data
        times[f"{world.name}.owned"] = owned_times(config, counted, world.ranks, stage)
        dense = dense_bytes(world, counted, 1)
        times[f"{world.name}.fsdp_alone"] = fsdp_times(config, counted, world.ranks, dense)
    return times


def show(
    found: Sequence[tuple[World, Counted]], ratios: dict[str, float], predicted: dict[str, Times]
) -> None:
    """Print the tables."""
    table = Table(title="per rank and step: GB sent for FFN-M, of 8 bytes per parameter; GiB of fp32 state")
    for heading in (
        "world",
        "FFN-M",
        "distinct ids",
        "owned GB",
        "dense GB",
        "ratio",
        "state GiB",
        "copies GiB",
    ):
        table.add_column(heading, justify="left" if heading in ("world", "FFN-M") else "right")
    for world, counted in found:
        state = sum(size for part, size in counted["state"].items() if part != "copies") / GIB
        copies = counted["state"]["copies"] / GIB
        dense = dense_bytes(world, counted) / 1e9
        sent = _sum(counted, "bytes", "alltoall_base") / 1e9
        owned = world.placement is not None
        table.add_row(
            world.name,
            world.placement or "base",
            f"{counted['distinct']:,}",
            f"{sent:.2f}" if owned else "",
            f"{dense:.2f}" if owned else "",
            f"{sent / dense:.3f}" if owned else "",
            f"{state:.2f}",
            f"{copies:.2f}",
        )
    console = Console(width=110, soft_wrap=True)
    console.print(table, soft_wrap=False)
    table = Table(title="predicted seconds per step, arithmetic: nothing was run, nothing overlaps")
    for heading in ("world", "compute", "tensor parallel", "network", "latency", "total"):
        table.add_column(heading, justify="left" if heading == "world" else "right")
    for name, times in predicted.items():
        table.add_row(name, *(f"{value:.2f}" for value in (*times, times.total)))
    console.print(table, soft_wrap=False)
    console.print(f"assumed: {ASSUMED}")
    for name, value in ratios.items():
        console.print(f"{name} = {value:.4g}")
