"""A plot of an ablation."""

from pathlib import Path

from mlm_train.analyze.ablate.study import Ablation, Row
from mlm_train.utils.files import write_figure


def plot_ablation(file: Path, ablation: Ablation) -> None:
    """Write a PNG with an axis per study: perplexity over alpha, layer, bits or share of ranks."""
    from matplotlib.figure import Figure

    exact = next(row for row in ablation.rows if row.point.study == "exact")
    studies = list(dict.fromkeys(row.point.study for row in ablation.rows if row is not exact))
    figure = Figure(figsize=(6.4, 3.6 * max(1, len(studies))), layout="constrained")
    for number, study in enumerate(studies):
        axes = figure.add_subplot(len(studies), 1, number + 1)
        rows = [row for row in ablation.rows if row.point.study == study]
        lines: dict[str, list[Row]] = {}
        for row in rows:
            lines.setdefault(line_of(row), []).append(row)
        for label, points in lines.items():
            pairs = sorted((place_of(row), row.scores["perplexity"]) for row in points)
            axes.plot(*zip(*pairs, strict=True), marker="o", label=label)
        axes.axhline(exact.scores["perplexity"], color="grey", linewidth=0.8)
        axes.set(title=study, xlabel=AXES[study], ylabel="perplexity", yscale="log")
        if len(lines) > 1:
            axes.legend(fontsize="small")
    write_figure(file, figure)


AXES = {
    "alpha": "alpha",
    "layer-alpha": "layer",
    "drop": "layer",
    "precision": "MB of the table",
    "rank": "share of the ranks cut",
}


def line_of(row: Row) -> str:
    """The line of a study's plot that a row is a point of."""
    point = row.point
    if point.study == "layer-alpha":
        return f"alpha {point.alpha:g}"
    return point.variant or point.part or point.study


def place_of(row: Row) -> float:
    """Where a row is on its study's axis (AXES)."""
    point = row.point
    if point.study == "precision":
        return (row.bytes or 0) / 1e6
    for value in (point.layer, point.cut, point.alpha):
        if value is not None:
            return float(value)
    return 0.0
