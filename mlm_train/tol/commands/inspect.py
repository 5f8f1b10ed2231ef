"""`mlm-train tol inspect`: its options, its tables on the terminal, and its plot."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.utils.arguments import MODEL_KINDS, add_action
from mlm_train.utils.checks import add_verify
from mlm_train.utils.files import write_figure
from mlm_train.utils.terminal import json_line
from mlm_train.utils.units import in_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from mlm_train.tol.tools.inspect import Inspection, Layer, Scored
    from mlm_train.utils.arguments import Actions

_WIDTH = 110
_LISTED = 3  # tokens per layer

_HELP = """Show what a table holds: sizes, errors, norms and spectra by layer, and which tokens are similar.

Reads the table once. Rows are taken as they are stored, without the model's alpha.

examples:
  mlm-train tol inspect tol/run1 --model exports/run1
  mlm-train tol inspect tol/run1-int4 --plot spectra.png
  mlm-train tol inspect tol/run1 --model exports/run1 --neighbours " the" " for" 17"""


def add_inspect(actions: "Actions") -> None:
    """Add the action."""
    parser = add_action(actions, "inspect", "show what a table holds", _HELP)
    parser.add_argument("table", metavar="TOL", help="folder written by `mlm-train tol build`")
    parser.add_argument(
        "--model", metavar="MODEL", help=f"for FFN-M's size, and tokens as text: {MODEL_KINDS}"
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw spectra, norms and errors as a PNG")
    parser.add_argument("--json", action="store_true", help="write one JSON object instead of tables")
    parser.add_argument(
        "--top", type=int, metavar="N", default=10, help="tokens per list (default %(default)s)"
    )
    add_verify(parser, "the table, and of --model,", "sizes")
    parser.add_argument(
        "--neighbours",
        nargs="+",
        metavar="TOKEN",
        default=(),
        help="tokens, as ids or text, whose most similar rows are listed",
    )


def run_inspect(args: argparse.Namespace) -> int:
    """Inspect, show, plot, and return exit code 0."""
    from mlm_train.tol.tools.inspect import inspect_tol
    from mlm_train.utils.files import check_output, is_png

    plot_file = None if args.plot is None else check_output("--plot", args.plot, is_png, "PNG")
    inspection = inspect_tol(args.table, args.model, args.top, args.neighbours, args.verify or "sizes")
    if args.json:
        print(json_line(asdict(inspection)))
    else:
        show(inspection)
    if plot_file is not None:
        plot(inspection, plot_file)
    return 0


def show(inspection: "Inspection") -> None:
    """Print the tables to standard output."""
    from rich.console import Console

    console = Console(width=_WIDTH, soft_wrap=True, highlight=False)
    for line in _summary(inspection):
        console.print(line, markup=False)
    console.print(_storage_table(inspection.layers), soft_wrap=False)
    console.print(_spectrum_table(inspection.layers), soft_wrap=False)
    for line in _tokens(inspection):
        console.print(line, markup=False)


def _summary(inspection: "Inspection") -> Iterator[str]:
    sizes = inspection.sizes
    yield (
        f"{inspection.table}: {inspection.vocab_size:,} rows of {len(inspection.layers)} of "
        f"{inspection.num_layers} layers x {inspection.hidden_size}"
    )
    stored = {layer.layer for layer in inspection.layers}
    if dropped := [str(layer) for layer in range(inspection.num_layers) if layer not in stored]:
        yield f"dropped layers, read as 0: {', '.join(dropped)}"
    x0 = f", {sizes.embedding:,} of them its embedding" if sizes.embedding else ""
    yield f"{in_units(sizes.bytes)}, {sizes.row:,} bytes per row{x0}; headers {in_units(sizes.other)}"
    yield f"{sizes.bytes / sizes.bfloat16:.3f} of all layers in bfloat16 ({in_units(sizes.bfloat16)})"
    if sizes.ffn_m is not None:
        yield f"{sizes.bytes / sizes.ffn_m:.2f} x FFN-M's weights in bfloat16 ({in_units(sizes.ffn_m)})"


def _storage_table(layers: "Sequence[Layer]") -> "Table":
    table = _table("layer", "type", "group", "rank", "bytes per row", "size", "relative error")
    for layer in layers:
        table.add_row(
            str(layer.layer),
            layer.dtype,
            _or_dash(layer.group_size),
            _or_dash(layer.rank),
            f"{layer.row_bytes:,}",
            in_units(layer.bytes),
            "-" if layer.error is None else f"{layer.error:.2e}",
        )
    return table


def _spectrum_table(layers: "Sequence[Layer]") -> "Table":
    headings = (f"rank {share}" for share in layers[0].ranks)
    table = _table("layer", "mean norm", "median", "max", "s first", "s last", *headings, "stable rank")
    for layer in layers:
        norms = (f"{layer.norms[name]:.4g}" for name in ("mean", "median", "max"))
        ends = (f"{layer.singular_values[end]:.4g}" for end in (0, -1))
        ranks = map(str, layer.ranks.values())
        table.add_row(str(layer.layer), *norms, *ends, *ranks, f"{layer.stable_rank:.1f}")
    return table


def _tokens(inspection: "Inspection") -> Iterator[str]:
    yield f"largest norms: {_listed(inspection.largest)}"
    for layer in inspection.layers:
        yield f"  layer {layer.layer}: {_listed(layer.largest[:_LISTED])}"
    like = inspection.likeness
    if like.consecutive is not None and like.random is not None and like.change is not None:
        yield (
            f"mean cosine of tokens t and t + 1: {like.consecutive:.4f}, of random pairs: {like.random:.4f}"
        )
        verdict = "would pay" if like.change < 1 else "would not pay"
        yield f"their differences hold {like.change:.3f} of the rows' energy: delta coding {verdict}"
    for asked in inspection.neighbours:
        yield f"nearest to {_name(asked.id, asked.text)}: {_listed(asked.nearest)}"


def _listed(tokens: "Sequence[Scored]") -> str:
    return ", ".join(f"{_name(token.id, token.text)} {token.value:.4g}" for token in tokens)


def _name(token: int, text: str | None) -> str:
    """An id, and its text with unprintable characters escaped."""
    return str(token) if text is None else f"{token} {text!r}"


def _table(*headings: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.justify = "right"
    return table


def _or_dash(number: int | None) -> str:
    return "-" if number is None else str(number)


def plot(inspection: "Inspection", file: Path) -> None:
    """Write a PNG of singular values, norms and, if known, relative errors by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = inspection.layers
    measured = [layer for layer in layers if layer.error is not None]
    figure, axes = pyplot.subplots(1, 3 if measured else 2, figsize=(15 if measured else 12, 4.5))
    _draw_spectra(axes[0], layers)
    for name in ("max", "mean", "median"):
        norms = [layer.norms[name] for layer in layers]
        axes[1].plot([layer.layer for layer in layers], norms, marker="o", label=name)
    axes[1].set_title("norms of rows")
    axes[1].legend()
    if measured:
        axes[2].bar([layer.layer for layer in measured], [layer.error for layer in measured])
        axes[2].set_title("relative error per layer")
    for axis in axes[1:]:
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(bottom=0)
        axis.set_axisbelow(True)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)


def _draw_spectra(axis: "Axes", layers: "Sequence[Layer]") -> None:
    """Draw singular values, from dark for the first layer to light for the last."""
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for number, layer in enumerate(layers):
        indices = range(1, len(layer.singular_values) + 1)
        colour = colours(number / max(1, len(layers)))
        axis.semilogy(indices, layer.singular_values, color=colour, label=f"layer {layer.layer}")
    axis.set_xlabel("index")
    axis.set_title("singular values of each layer")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", ncols=1 + len(layers) // 12)
