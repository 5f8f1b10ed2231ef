"""What `bench tol` shows: a table, words and the plot, all from the report's rows."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlm_train.bench import report
from mlm_train.utils.files import write_figure

Row = dict[str, Any]

LEGEND = """\
gemm.N: bare matrix products of FFN-M in bf16, chunks of N rows; compute: FFN-M as a build computes it. Both
over the whole vocabulary, all processes together, in turn; one.*: a single process.
whole: parts.open (the export read and hashed) and parts.run (the workers' start, writing and hashing too).
Of the other parts, one process alone: parts.write takes the space, writes and syncs; parts.commit names. A
build hashes and writes on a thread, while it computes.
worker.private: what a worker alone holds at its peak; worker.share: with its part of what others hold too
(weights, files that are read); worker.resident: with all of that."""


def show(rows: list[Row], ratios: dict[str, float], found: dict[str, Any], best: str) -> None:
    """The table, ratios and machine."""
    table = Table(title="a build of a ToL")
    for heading in ("figure", "unit", "median", "min", "max", "runs"):
        table.add_column(heading, justify="left" if heading in ("figure", "unit") else "right")
    for row in rows:
        form = "{:,.0f}" if row["unit"] == "MiB" else "{:,.3f}"
        shown = (form.format(row[key]) for key in ("median", "min", "max"))
        table.add_row(row["name"], row["unit"], *shown, str(row["runs"]))
    wide = Console(width=110, soft_wrap=True)
    wide.print(table, soft_wrap=False)
    wide.print(LEGEND)
    for name, ratio in ratios.items():
        wide.print(f"{name}: {ratio:.3f}")
    wide.print(f"products at their best: {best}")
    wide.print(report.describe(found))


def plot(rows: list[Row], layers: int, best: str, file: Path) -> None:
    """A PNG: seconds of all layers' products, of FFN-M, and of the whole build."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {row["name"]: row for row in rows}
    bars = {f"products ({best})": (best, layers), "FFN-M": ("compute", layers), "whole build": ("whole", 1)}
    figure, axes = pyplot.subplots(figsize=(8, 2.6))
    for label, (name, times) in bars.items():
        low, middle, high = (by_name[name][key] * times for key in ("min", "median", "max"))
        axes.barh(label, middle, xerr=[[middle - low], [high - middle]], color="tab:blue")
    axes.invert_yaxis()
    axes.set_xlabel("s, median (whiskers: least and most)")
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)
