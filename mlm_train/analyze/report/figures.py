"""The figures of a report that do not depend on a layer's tokens, as plotly's own JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlm_train.analyze.ablate.command import NEED_TABLE
from mlm_train.analyze.ablate.plot import AXES, line_of, place_of
from mlm_train.analyze.ablate.study import Ablation, Row
from mlm_train.analyze.hooks import PARTS
from mlm_train.analyze.report.inputs import Shares
from mlm_train.checkpoint.reading.logical_folder import ModelFolder
from mlm_train.tol.allocate.sensitivity import spectrum_of
from mlm_train.tol.serve.reader import TableReader

Figure = dict[str, Any]  # title; data and layout for Plotly.newPlot
_PART_NAMES = {"attention": "attention", "ffn": "FFN-C (base: FFN)", "ffn_m": "FFN-M"}


def loss_figures(models: Mapping[str, ModelFolder]) -> list[Figure]:
    """Losses of runs by step, from their TensorBoard files; none where no model is a run's."""
    traces = []
    for path, model in models.items():
        for tag, mode in (("train/loss", "lines"), ("validation/loss", "lines+markers")):
            points = scalars(model, tag)
            if points:
                traces.append(_trace(f"{path} {tag}", *zip(*points, strict=True), mode=mode))
    return [_figure("Loss", traces, "step", "nats per token")] if traces else []


def scalars(model: ModelFolder, tag: str) -> list[tuple[int, float]]:
    """Step and value of a tag of the run that a checkpoint is of; empty for an export."""
    folder = model.home / "tensorboard"
    if model.manifest is None or not folder.is_dir():
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 2000})  # a seeded sample of a longer curve
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def spectrum_figures(tables: Mapping[str, TableReader], shown: Any) -> list[Figure]:
    """Singular values of each layer of each table; shown(layers): iterates with a progress bar."""
    figures = []
    for path, table in tables.items():
        traces = []
        for layer in shown(table.index.layers):
            values = [float(f"{value:.4g}") for value in spectrum_of(table, layer).values.tolist()]
            traces.append(_trace(f"layer {layer}", range(1, len(values) + 1), values, mode="lines"))
        figures.append(_figure(f"Singular values of {path}", traces, "number", "singular value", log="y"))
    return figures


def ablation_figures(ablations: Mapping[str, Ablation]) -> list[Figure]:
    """A figure per study of all files, and perplexity over the size of the table for those that have one."""
    rows = [(path, row) for path, ablation in ablations.items() for row in ablation.rows]
    exact = {path: _exact(ablation) for path, ablation in ablations.items()}
    studies = dict.fromkeys(row.point.study for _, row in rows if row.point.study in AXES)
    figures = []
    for study in studies:
        chosen = [(path, row) for path, row in rows if row.point.study == study]
        title = f"Ablation: {study}"
        figures.append(_figure(title, _lines(chosen, exact, place_of), AXES[study], "perplexity", log="y"))
    sized = [(path, row) for path, row in rows if row.point.study in NEED_TABLE and row.bytes is not None]
    if sized:
        traces = _lines(sized, exact, lambda row: (row.bytes or 0) / 1e6)
        title = "Perplexity by size of the table"
        figures.append(_figure(title, traces, "MB of the table", "perplexity", log="xy"))
    return figures


def _exact(ablation: Ablation) -> float | None:
    found = (row.scores["perplexity"] for row in ablation.rows if row.point.study == "exact")
    return next(found, None)


def _lines(
    rows: Sequence[tuple[str, Row]], exact: Mapping[str, float | None], place: Any
) -> list[dict[str, Any]]:
    """Lines of perplexity by place, one per file and kind of change; dashed: each model as it is."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for path, row in rows:
        point = (place(row), row.scores["perplexity"], row.point.name)
        lines.setdefault(f"{path} {line_of(row)}", []).append(point)
    traces = [
        _trace(name, xs, ys, mode="lines+markers", text=texts)
        for name, points in lines.items()
        for xs, ys, texts in [zip(*sorted(points), strict=True)]
    ]
    ends = [place(row) for _, row in rows]
    for path in dict.fromkeys(path for path, _ in rows):
        if (value := exact[path]) is not None:
            dashed = {"dash": "dash", "color": "grey"}
            span = [min(ends), max(ends)]
            traces.append(_trace(f"{path} as it is", span, [value] * 2, mode="lines", line=dashed))
    return traces


def shares_figures(shares: Mapping[str, Shares]) -> list[Figure]:
    """Stacked bars: the share of each part in what a layer adds to the residual stream."""
    figures = []
    for path, found in shares.items():
        numbers = [layer.layer for layer in found.layers]
        traces = []
        for part in PARTS:
            given = [getattr(layer, part) for layer in found.layers]
            if any(given):
                heights = [None if one is None else one.share for one in given]
                traces.append({**_trace(_PART_NAMES[part], numbers, heights), "type": "bar"})
        figure = _figure(f"Shares of a layer's update, {path}", traces, "layer", "share")
        figure["layout"]["barmode"] = "relative"
        figures.append(figure)
    return figures


def _trace(name: str, xs: Iterable[Any], ys: Iterable[Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "x": list(xs), "y": list(ys), **more}


def _figure(title: str, traces: list[dict[str, Any]], x: str, y: str, log: str = "") -> Figure:
    axes = {
        f"{axis}axis": {"title": {"text": text}, "type": "log" if axis in log else "linear"}
        for axis, text in (("x", x), ("y", y))
    }
    return {"title": title, "data": traces, "layout": axes}
