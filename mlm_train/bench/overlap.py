"""`bench overlap`: how much of a table's reads a forward pass hides, from a trace of `generate --trace`."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from mlm_train.bench import report
from mlm_train.errors import UserError
from mlm_train.utils.files import write_figure
from mlm_train.utils.trace import read_trace

SHOWN = 2.0  # of the time until the last read, in the figure


class Interval(NamedTuple):
    """From `start` until `end`, in seconds."""

    start: float
    end: float


class Pass(NamedTuple):
    """The spans of a forward pass: from the end of the pass before to the end of its own last layer."""

    reads: list[dict[str, Any]]
    waits: list[dict[str, Any]]
    layers: list[dict[str, Any]]

    def seconds(self) -> dict[str, float]:
        """Seconds in which something was read, layers ran, they waited, and rows were read behind them."""
        reads, waits, layers = (union(map(interval, spans)) for spans in self)
        # What is left of a layer without its wait is computation; x0 of a table is waited for before them.
        inside = common(reads, layers)
        hidden = total(inside) - total(common(inside, waits))
        return {"reads": total(reads), "layers": total(layers), "waits": total(waits), "hidden": hidden}

    def per_layer(self) -> dict[str, list[float]]:
        """Seconds of each layer that ran while something was read, and of each other one."""
        reads, layers = union(map(interval, self.reads)), list(map(interval, self.layers))
        beside = [bool(common(reads, [layer])) for layer in layers]
        return {
            name: [
                layer.end - layer.start
                for layer, reading in zip(layers, beside, strict=True)
                if reading == which
            ]
            for name, which in (("layer.beside_reads", True), ("layer.alone", False))
        }


def bench_overlap(args: argparse.Namespace) -> int:
    """Print what a pass of the trace hides, write the report and the figure. Returns 0."""
    report.check_outputs(args)
    found = pass_of(read_trace(Path(args.trace)), args.number, args.trace)
    seconds = found.seconds()
    hidden = seconds["hidden"] / seconds["reads"]
    console = Console(soft_wrap=True, highlight=False)
    threads = len({event["tid"] for event in found.reads})
    console.print(f"{len(found.reads)} reads by {threads} threads: {1e3 * seconds['reads']:.1f} ms")
    console.print(f"layers: {1e3 * seconds['layers']:.1f} ms, of which waits {1e3 * seconds['waits']:.2f} ms")
    console.print(f"of the time of the reads, {hidden:.1%} is behind the computation of layers")
    rows = [report.row(name, [value], "s") for name, value in seconds.items()]
    rows += [report.row(name, values, "s") for name, values in found.per_layer().items() if values]
    for row in rows[len(seconds) :]:
        console.print(f"{row['name']}: {row['runs']} of {1e3 * row['median']:.1f} ms (median)")
    if args.json is not None:
        report.write_report(Path(args.json), report.machine(), rows, {"hidden_over_reads": hidden})
    if args.plot is not None:
        _plot(found, Path(args.plot))
    return 0


def pass_of(events: Sequence[dict[str, Any]], number: int, trace: str) -> Pass:
    """The spans of a forward pass, counted from 1. UserError for one that is not there, or reads nothing."""
    layers = sorted((event for event in events if event["name"].startswith("layer ")), key=interval)
    starts = [place for place, event in enumerate(layers) if event["name"] == layers[0]["name"]]
    if not 1 <= number <= len(starts):
        raise UserError(f"{trace} has {len(starts)} forward passes: --pass {number} is none of them")
    first, last = starts[number - 1], [*starts[1:], len(layers)][number - 1]
    begin = interval(layers[first - 1]).end if first else float("-inf")
    end = interval(layers[last - 1]).end
    inside = [event for event in events if begin <= interval(event).start < end]
    reads, waits = ([event for event in inside if event["name"] == name] for name in ("tol.read", "tol.wait"))
    if not reads:
        raise UserError(
            f"{trace} has no reads in --pass {number}: trace a model with --tol and --tol-tier disk"
        )
    return Pass(reads, waits, layers[first:last])


def interval(event: dict[str, Any]) -> Interval:
    """When a span was; traces are in microseconds."""
    return Interval(event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, in disjoint intervals."""
    found: list[Interval] = []
    for each in sorted(intervals):
        if found and each.start <= found[-1].end:
            found[-1] = Interval(found[-1].start, max(found[-1].end, each.end))
        else:
            found.append(each)
    return found


def common(ones: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The time that two lists of disjoint intervals have in common."""
    both = (Interval(max(a.start, b.start), min(a.end, b.end)) for a in ones for b in others)
    return [each for each in both if each.start < each.end]


def total(intervals: Iterable[Interval]) -> float:
    """Seconds of disjoint intervals."""
    return sum(each.end - each.start for each in intervals)


def _plot(found: Pass, file: Path) -> None:
    """Reads above, a lane for each thread; layers and their waits below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start = min(interval(event).start for event in (*found.reads, *found.layers))

    def bars(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
        """Beginning and length, in ms."""
        return [(1e3 * (interval(event).start - start), event["dur"] / 1e3) for event in events]

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 4.4), height_ratios=(3, 1))
    threads = sorted({event["tid"] for event in found.reads})
    parts = sorted({event["args"].get("part", 0) for event in found.reads})
    for part in parts:
        for lane, thread in enumerate(threads):
            mine = [e for e in found.reads if (e["tid"], e["args"].get("part", 0)) == (thread, part)]
            label = f"part {part + 1} of the rows" if lane == 0 else None
            above.broken_barh(bars(mine), (lane, 0.9), color=f"C{part}", label=label)
    above.set_ylabel(f"reads, {len(threads)} threads")
    above.broken_barh([], (0, 1), color="red", label="a layer waits for rows")
    above.legend(fontsize=8, loc="upper right")
    for number, (event, (begin, length)) in enumerate(zip(found.layers, bars(found.layers), strict=True)):
        below.broken_barh([(begin, length)], (0, 1), color=("0.75", "0.88")[number % 2])
        below.text(begin + length / 2, 0.5, event["name"], ha="center", va="center", fontsize=8, clip_on=True)
    below.broken_barh(bars(found.waits), (0, 1), color="red")
    below.set_yticks([])
    below.set_ylabel("layers")
    below.set_xlabel("ms")
    below.set_xlim(0, SHOWN * 1e3 * (max(interval(event).end for event in found.reads) - start))
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)
