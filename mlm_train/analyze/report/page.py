"""The page: HTML with plotly.js, its own script and all data within."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from mlm_train.analyze.keys.folder import DEFINITIONS
from mlm_train.analyze.report.figures import (
    Figure,
    ablation_figures,
    loss_figures,
    scalars,
    shares_figures,
    spectrum_figures,
)
from mlm_train.analyze.report.inputs import Inputs
from mlm_train.analyze.report.layers import COLUMNS, layer_data, statistics_rows
from mlm_train.evaluate.report import finite
from mlm_train.model.counts import count_parameters
from mlm_train.utils.files import replace_file, writing
from mlm_train.utils.progress import tracked
from mlm_train.utils.units import in_units, perplexity

HERE = Path(__file__).parent
# The browser itself refuses what would come from elsewhere. plotly.js makes styles and pictures of its own.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; worker-src blob:"
)


def write_report(file: Path, title: str, inputs: Inputs) -> None:
    """Write the page. UserError where it cannot be written, or an input is damaged."""
    page = io.BytesIO()
    for part in _parts(title, inputs):
        page.write(part.encode())
    with writing(file):
        replace_file(file, page.getvalue())


def script_json(tree: Any) -> str:
    """JSON for a <script> element: ASCII without < > &; null for numbers that JSON lacks."""
    text = json.dumps(finite(tree), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _parts(title: str, inputs: Inputs) -> Iterator[str]:
    from plotly.offline import get_plotlyjs

    yield (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title>\n<style>\n{_own('page.css')}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head><body>\n<h1>{escape(title)}</h1>\n"
    )
    figures: list[Figure] = []
    if inputs.models:
        yield _section("Models", _table(("model", "kind", *_MODEL_COLUMNS), _models(inputs)))
        yield from _drawn(figures, loss_figures(inputs.models))
    if inputs.keys:
        yield _section("Keys", _own("keys.html") + _definitions())
        yield from _keys(inputs)
    if inputs.tables:
        tables = (
            (path, table.index.dtype, in_units(table.index.bytes)) for path, table in inputs.tables.items()
        )
        yield _section("Tables", _table(("table", "type", "size"), tables))
        yield from _drawn(figures, spectrum_figures(inputs.tables, partial(tracked, what="layers")))
    yield from _drawn(figures, ablation_figures(inputs.ablations))
    yield from _drawn(figures, shares_figures(inputs.shares))
    yield _data("figures", figures)
    yield f"<script>\n{_own('page.js')}</script>\n</body></html>\n"


def _drawn(figures: list[Figure], more: Iterable[Figure]) -> Iterator[str]:
    """A section for each further figure, which the page's script draws by its place in `figures`."""
    for figure in more:
        yield _section(str(figure["title"]), f'<div class="figure" id="figure-{len(figures)}"></div>\n')
        figures.append(figure)


def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _section(title: str, content: str) -> str:
    """A section of the page; content: HTML."""
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>\n"


def _data(name: str, tree: Any) -> str:
    return f'<script type="application/json" id="{name}">{script_json(tree)}</script>\n'


_MODEL_COLUMNS = ("layers", "hidden", "active parameters", "total parameters", "last validation perplexity")


def _models(inputs: Inputs) -> Iterator[list[str]]:
    """Parameters are without embedding and head, as in the paper."""
    for path, model in inputs.models.items():
        config, counted = model.config, count_parameters(model.config)
        losses = scalars(model, "validation/loss")
        last = f"{perplexity(losses[-1][1]):.4f} at step {losses[-1][0]}" if losses else "-"
        sizes = (config.num_hidden_layers, config.hidden_size, counted.active, counted.total)
        yield [path, config.kind, *(f"{size:,}" for size in sizes), last]


def _definitions() -> str:
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS.items())
    return f"<details><summary>Definitions</summary><dl>{''.join(lines)}</dl></details>\n"


def _keys(inputs: Inputs) -> Iterator[str]:
    """Data of all analyses: one element per layer, so that the page decodes only what is looked at."""
    yield _data("texts", inputs.texts)
    index = []
    for number, (path, folder) in enumerate(inputs.keys.items()):
        statistics = [folder.statistics(layer) for layer in folder.layers]
        for one in tracked(range(len(statistics)), "layers"):
            yield _data(f"layer-{number}-{statistics[one].layer}", layer_data(folder, statistics[one]))
        index.append({
            "path": path,
            "layers": folder.layers,
            "columns": ["layer", *COLUMNS.values()],
            "statistics": statistics_rows(statistics),
        })  # fmt: skip
    yield _data("analyses", index)
