"""`mlm-train tol inspect`: its options, and what it found as tables on the terminal and as a plot."""

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
_LISTED = 3  # tokens of a layer

_HELP = """Show what a table holds: sizes, errors, norms and spectra by layer, and which tokens are alike.

Reads the table once. FFN_M's rows are taken as they are stored, without the model's alpha.

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
        "--top", type=int, metavar="N", default=10, help="tokens in a list (default %(default)s)"
    )
    add_verify(parser, "the table, and of --model,", "sizes")
    parser.add_argument(
        "--neighbours",
        nargs="+",
        metavar="TOKEN",
        default=(),
        help="tokens, as ids or as text, whose most similar rows are looked for",
    )


def run_inspect(args: argparse.Namespace) -> int:
    """Exit code 0."""
    from mlm_train.tol.tools.inspect import inspect_tol
    from mlm_train.utils.files import check_output, is_png

    drawn = None if args.plot is None else check_output("--plot", args.plot, is_png, "PNG")
    found = inspect_tol(args.table, args.model, args.top, args.neighbours, args.verify or "sizes")
    if args.json:
        print(json_line(asdict(found)))
    else:
        show(found)
    if drawn is not None:
        plot(found, drawn)
    return 0


def show(found: "Inspection") -> None:
    """All of it on standard output."""
    from rich.console import Console

    console = Console(width=_WIDTH, soft_wrap=True, highlight=False)
    for line in _summary(found):
        console.print(line, markup=False)
    console.print(_stored(found.layers), soft_wrap=False)
    console.print(_numbers(found.layers), soft_wrap=False)
    for line in _tokens(found):
        console.print(line, markup=False)


def _summary(found: "Inspection") -> Iterator[str]:
    sizes = found.sizes
    yield (
        f"{found.table}: {found.vocab_size:,} rows of {len(found.layers)} of {found.num_layers} layers "
        f"x {found.hidden_size}"
    )
    stored = {one.layer for one in found.layers}
    if dropped := [str(layer) for layer in range(found.num_layers) if layer not in stored]:
        yield f"dropped layers, read as 0: {', '.join(dropped)}"
    yield f"{in_units(sizes.bytes)}, {sizes.row:,} bytes a row; headers {in_units(sizes.other)}"
    yield f"{sizes.bytes / sizes.bfloat16:.3f} of all layers in bfloat16 ({in_units(sizes.bfloat16)})"
    if sizes.ffn_m is not None:
        yield f"{sizes.bytes / sizes.ffn_m:.2f} x FFN-M's weights in bfloat16 ({in_units(sizes.ffn_m)})"


def _stored(layers: "Sequence[Layer]") -> "Table":
    table = _table("layer", "type", "group", "rank", "bytes a row", "size", "relative error")
    for one in layers:
        table.add_row(
            str(one.layer),
            one.dtype,
            _or_dash(one.group_size),
            _or_dash(one.rank),
            f"{one.row_bytes:,}",
            in_units(one.bytes),
            "-" if one.error is None else f"{one.error:.2e}",
        )
    return table


def _numbers(layers: "Sequence[Layer]") -> "Table":
    ranks = (f"rank {share}" for share in layers[0].ranks)
    table = _table("layer", "mean norm", "median", "max", "s first", "s last", *ranks, "stable rank")
    for one in layers:
        norms = (f"{one.norms[name]:.4g}" for name in ("mean", "median", "max"))
        ends = (f"{one.singular_values[end]:.4g}" for end in (0, -1))
        table.add_row(str(one.layer), *norms, *ends, *map(str, one.ranks.values()), f"{one.stable_rank:.1f}")
    return table


def _tokens(found: "Inspection") -> Iterator[str]:
    yield f"largest norms: {_listed(found.largest)}"
    for one in found.layers:
        yield f"  layer {one.layer}: {_listed(one.largest[:_LISTED])}"
    like = found.likeness
    if like.consecutive is not None and like.random is not None and like.change is not None:
        yield (
            f"mean cosine of tokens t and t + 1: {like.consecutive:.4f}, of random pairs: {like.random:.4f}"
        )
        verdict = "would pay" if like.change < 1 else "would not pay"
        yield f"their differences hold {like.change:.3f} of the rows' energy: delta coding {verdict}"
    for asked in found.neighbours:
        yield f"nearest to {_name(asked.id, asked.text)}: {_listed(asked.nearest)}"


def _listed(tokens: "Sequence[Scored]") -> str:
    return ", ".join(f"{_name(token.id, token.text)} {token.value:.4g}" for token in tokens)


def _name(token: int, text: str | None) -> str:
    """An id, and its text with what cannot be seen escaped."""
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


def plot(found: "Inspection", file: Path) -> None:
    """A PNG: singular values of each layer, norms of its rows, and relative errors where they are known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = [one for one in found.layers if one.error is not None]
    figure, axes = pyplot.subplots(1, 3 if known else 2, figsize=(15 if known else 12, 4.5))
    _draw_spectra(axes[0], found.layers)
    for name in ("max", "mean", "median"):
        norms = [one.norms[name] for one in found.layers]
        axes[1].plot([one.layer for one in found.layers], norms, marker="o", label=name)
    axes[1].set_title("norms of rows")
    axes[1].legend()
    if known:
        axes[2].bar([one.layer for one in known], [one.error for one in known])
        axes[2].set_title("relative error of a layer")
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
    """The first layers dark, the last ones light."""
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for number, one in enumerate(layers):
        count = range(1, len(one.singular_values) + 1)
        colour = colours(number / max(1, len(layers)))
        axis.semilogy(count, one.singular_values, color=colour, label=f"layer {one.layer}")
    axis.set_xlabel("index")
    axis.set_title("singular values of each layer")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", ncols=1 + len(layers) // 12)
