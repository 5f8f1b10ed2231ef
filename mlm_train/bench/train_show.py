"""The output of `bench train`: tables, notes and the plot; all but the notes from the JSON alone."""

import math
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mlm_train.bench import report
from mlm_train.bench.train_figures import PARTS, Row, TrainFigures
from mlm_train.utils.files import write_figure

WIDTH = 132  # of the tables
TEXT_WIDTH = 110  # of the notes
GIB = 2**30
QUIET = 1.15  # maximum of slowest over fastest micro-batch of a variant on a quiet machine


class Figures:
    """The rows of a report by name."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.rows: dict[str, Row] = {row["name"]: row for row in tree["rows"]}
        self.ratios: dict[str, float] = tree["ratios"]
        self.preset = next(iter(self.rows)).partition(".")[0]
        ends = [name for name in self.rows if name.endswith(".speed")]
        self.variants = [name.removeprefix(f"{self.preset}.").removesuffix(".speed") for name in ends]

    def get(self, variant: str, figure: str, key: str = "median") -> float | None:
        """A row's median, or its value under `key`; None where there is no such row."""
        row = self.rows.get(f"{self.preset}.{variant}.{figure}")
        return None if row is None else float(row[key])

    def of(self, variant: str, figure: str, key: str = "median") -> float:
        """Like `get`, for a figure that every variant has."""
        return float(self.rows[f"{self.preset}.{variant}.{figure}"][key])

    def over(self, variant: str, other: str) -> float | None:
        """Speed relative to another variant's; None where that was not measured."""
        other_speed = self.get(other, "speed")
        return None if other_speed is None else self.of(variant, "speed") / other_speed

    def shares(self, variant: str) -> tuple[float, float | None, float]:
        """Fractions of a step's time: begin and finish; the model without FFN; the FLOPs at peak speed."""
        step, noffn = self.of(variant, "step"), self.get("noffn", "step")
        ends = self.of(variant, "begin") + self.of(variant, "finish")
        peak = self.rows[f"{self.preset}.product_peak"]["median"]
        same = None if noffn is None or variant == "noffn" else noffn / step
        return ends / step, same, self.of(variant, "flops") / peak / step


def _table(title: str, *headings: str) -> Table:
    """A table whose first column is text and whose other columns are numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def speed_table(figures: Figures) -> Table:
    """Table of speed, memory and FLOPs of every variant."""
    memory = ("GiB:\nweights", "\ngrads", "\nAdamW", "\ntables", "\nactiv.", "\nruntime")
    speed = ("tokens/s\nmedian", "\nmin", "\nmax", "/ hf\neager", "/ base")
    arithmetic = ("TFLOP\n/ step", "TFLOP\n/s", "/ limit")
    title = f"training, shape {figures.preset}"
    table = _table(title, "variant", *speed, *memory, *arithmetic)
    for name in figures.variants:
        table.add_row(
            name,
            *(f"{figures.of(name, 'speed', key):.0f}" for key in ("median", "min", "max")),
            _ratio(figures.over(name, "hf.eager")),
            _ratio(figures.over(name, "base")),
            *(f"{figures.of(name, f'memory.{part}') / GIB:.2f}" for part in PARTS),
            f"{figures.of(name, 'flops') / 1e12:.2f}",
            f"{figures.of(name, 'achieved') / 1e12:.3f}",
            _ratio(figures.get(name, "over_limit")),
        )
    return table


def bound_table(figures: Figures) -> Table:
    """Table of where the time of a step goes."""
    parts = ("step, s", "begin, s", "micro-\nbatch, s", "finish, s", "AdamW, s")
    shares = ("begin and\nfinish", "as noffn", "FFN and\nthe rest", "matmuls\nat peak")
    table = _table("time of a step", "variant", *parts, *shares)
    for name in figures.variants:
        ends, same, at_peak = figures.shares(name)
        table.add_row(
            name,
            f"{figures.of(name, 'step'):.2f}",
            *(f"{figures.of(name, part):.2f}" for part in ("begin", "micro_batch", "finish", "optimizer")),
            f"{ends:.0%}",
            "" if same is None else f"{same:.0%}",
            "" if same is None else f"{1 - same:.0%}",
            f"{at_peak:.0%}",
        )
    return table


LEGEND = """\
tokens/s: of begin + micro-batches x the median micro-batch + finish, without AdamW's step, which has its own
column; the same for transformers.
/ limit: speed relative to base, divided by base's FLOPs over this variant's, without recomputation.
activ.: peak resident set of a step before its optimizer, less all that is listed. runtime: resident set
before the model, after a step of a tiny one. tables: FFN-M's, their gradients and the step's rows.
as noffn: the time of the same model without any FFN. matmuls at peak: the time of the formula's FLOPs at the
speed of square matrix multiplications of size 1,024 on this machine."""

ON_A_DEVICE = (
    "memory is that of tensors on the device, as torch's allocator counts them; variants were measured one "
    "after another; square matrix multiplications of size 8,192"
)


def notes(measured: TrainFigures, runs: int, fingerprint: str) -> list[str]:
    """Remarks on the figures, in plain text."""
    preset, records = measured.preset, measured.records
    ratios = [f"{ratio:.3f} of {tokens:,}" for tokens, ratio in sorted(measured.distinct.items())]
    lines = [
        f"{preset.layers} layers, hidden {preset.hidden}, {preset.heads} heads, FFN {preset.ffn}, vocabulary "
        f"{preset.vocabulary:,}, untied; sequence {preset.sequence:,}, {preset.micro_batch} per micro-batch, "
        f"{preset.tokens:,} tokens per step; {measured.precision}, weights and gradients fp32; {runs} timed "
        f"micro-batches per variant, alternating",
        f"data fingerprint {fingerprint[:16]}; distinct ids / tokens: {measured.distinct_micro:.3f} in a "
        f"micro-batch of {preset.micro_tokens:,}, {', '.join(ratios)} in a step",
        "parameters: "
        + ", ".join(f"{name} {record.built['parameters']:,}" for name, record in records.items()),
    ]
    if measured.best is not None:
        lines.append(f"`memory` in the ratios is {measured.best}, its fastest variant here")
    noisy = [name for name, record in records.items() if max(record.run) > QUIET * min(record.run)]
    if noisy:
        lines.append(f"NOT quiet: micro-batches of one variant differ by more than 15 %: {', '.join(noisy)}")
    for name, record in records.items():
        if record.whole:
            deviations = measured.deviations(name)
            mean, count = statistics.mean(deviations), len(deviations)
            error = statistics.stdev(deviations) / count**0.5 if count > 1 else math.nan
            verdict = "within" if abs(mean) <= 0.03 else "NOT within"
            lines.append(
                f"{name}: the sum of the parts deviates by {mean:+.1%} (standard error {error:.1%}) from a "
                f"whole step, mean over {count} (median {measured.whole_step(name):.1f} s): {verdict} 3 %"
            )
    return lines


def show(tree: dict[str, Any], faults: list[str]) -> None:
    """Print everything on standard output."""
    wide = Console(width=WIDTH, soft_wrap=True, highlight=False)
    for line in lines_of(tree):
        wide.print(line, markup=False)
    for fault in faults:
        wide.print(fault, style="bold red", markup=False)


def lines_of(tree: dict[str, Any]) -> Iterator[str]:
    """Tables, ratios, notes and machine as plain text."""
    figures = Figures(tree)
    plain = Console(width=WIDTH, no_color=True, highlight=False)
    for table in (speed_table(figures), bound_table(figures)):
        with plain.capture() as captured:
            plain.print(table)
        yield "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())
    yield LEGEND
    yield from (f"{name}: {ratio:.3f}" for name, ratio in figures.ratios.items())
    for text in (*tree.get("notes", ()), report.describe(tree["machine"])):
        yield textwrap.fill(text, TEXT_WIDTH, subsequent_indent="  ", break_long_words=False)


def plot(tree: dict[str, Any], file: Path) -> None:
    """Write a PNG: speed of every variant, and of memory over base by tokens per step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = Figures(tree)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2))
    medians = [figures.of(name, "speed") for name in figures.variants]
    sides = [
        [abs(figures.of(name, "speed", key) - figures.of(name, "speed")) for name in figures.variants]
        for key in ("min", "max")
    ]
    left.barh(figures.variants, medians, xerr=sides, color=[_colour(name) for name in figures.variants])
    left.invert_yaxis()
    left.set_xlabel("tokens/s, median (whiskers: slowest and fastest micro-batch)")
    left.set_title(f"shape {figures.preset}")
    curve = _curve(figures)
    right.plot(list(curve), list(curve.values()), marker="o", label="measured")
    limit = {tokens: value for tokens, value in _limits(figures).items() if tokens in curve}
    right.plot(list(limit), list(limit.values()), linestyle="--", color="grey", label="FLOPs by formula")
    right.set_xscale("log", base=2)
    right.set_xticks(list(curve), [f"{tokens:,}" for tokens in curve])
    right.set_xlabel("tokens per step")
    right.set_title("speed of memory over base")
    right.grid(alpha=0.3)
    right.legend()
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)


def _curve(figures: Figures) -> dict[int, float]:
    return _by_tokens(figures, f"{figures.preset}.memory_over_base_of_")


def _limits(figures: Figures) -> dict[int, float]:
    return _by_tokens(figures, f"{figures.preset}.memory_over_base_by_flops_of_")


def _by_tokens(figures: Figures, start: str) -> dict[int, float]:
    """Tokens per step -> ratio, of the ratios whose names start with `start`."""
    by_tokens = {
        int(name.removeprefix(start)): ratio
        for name, ratio in figures.ratios.items()
        if name.startswith(start)
    }
    return dict(sorted(by_tokens.items()))


def _colour(name: str) -> str:
    families = {"hf": "tab:grey", "base": "tab:blue", "noffn": "lightgrey", "flex": "tab:green"}
    return next((c for start, c in families.items() if name.startswith(start)), "tab:orange")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
