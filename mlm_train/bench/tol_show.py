"""The output of `bench tol`: a table, its legend and a plot, from the report's rows."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlm_train.bench import report
from mlm_train.utils.files import write_figure

Row = dict[str, Any]

LEGEND = """\
gemm.N: bare matmuls of FFN-M in bf16, chunks of N rows; compute: FFN-M as a build computes it. Both over the
whole vocabulary, all processes at once, in turn; one.*: a single process.
whole: parts.open (reading and hashing the export) and parts.run (with worker start, writing and hashing).
The other parts are of one process alone: parts.write reserves the space, writes and syncs; parts.commit
renames. A build hashes and writes in threads while it computes.
worker.private: a worker's own memory at its peak (USS); worker.share: with its share of shared memory
(weights, files; PSS); worker.resident: with all shared memory (RSS)."""


def show(rows: list[Row], ratios: dict[str, float], machine: dict[str, Any], best: str) -> None:
    """Print the table, its legend, the ratios and the machine."""
    table = Table(title="a build of a ToL")
    for heading in ("figure", "unit", "median", "min", "max", "runs"):
        table.add_column(heading, justify="left" if heading in ("figure", "unit") else "right")
    for row in rows:
        form = "{:,.0f}" if row["unit"] == "MiB" else "{:,.3f}"
        cells = (form.format(row[key]) for key in ("median", "min", "max"))
        table.add_row(row["name"], row["unit"], *cells, str(row["runs"]))
    console = Console(width=110, soft_wrap=True)
    console.print(table, soft_wrap=False)
    console.print(LEGEND)
    for name, ratio in ratios.items():
        console.print(f"{name}: {ratio:.3f}")
    console.print(f"fastest matmuls: {best}")
    console.print(report.describe(machine))


def plot(rows: list[Row], layers: int, best: str, file: Path) -> None:
    """Write a PNG of the seconds of all layers' matmuls, of FFN-M, and of the whole build."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {row["name"]: row for row in rows}
    bars = {f"matmuls ({best})": (best, layers), "FFN-M": ("compute", layers), "whole build": ("whole", 1)}
    figure, axes = pyplot.subplots(figsize=(8, 2.6))
    for label, (name, times) in bars.items():
        low, middle, high = (by_name[name][key] * times for key in ("min", "median", "max"))
        axes.barh(label, middle, xerr=[[middle - low], [high - middle]], color="tab:blue")
    axes.invert_yaxis()
    axes.set_xlabel("s, median (whiskers: min and max)")
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)
