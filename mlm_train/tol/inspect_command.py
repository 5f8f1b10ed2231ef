"""`mlm-train tol inspect`: its words, and what runs."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from mlm_train.arguments import MODEL_KINDS, add_action
from mlm_train.checks import add_verify
from mlm_train.terminal import json_line

if TYPE_CHECKING:
    from mlm_train.arguments import Actions

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
    from mlm_train.files import check_output, is_png
    from mlm_train.tol.inspect import inspect_tol
    from mlm_train.tol.inspect_show import plot, show

    drawn = None if args.plot is None else check_output("--plot", args.plot, is_png, "PNG")
    found = inspect_tol(args.table, args.model, args.top, args.neighbours, args.verify or "sizes")
    if args.json:
        print(json_line(asdict(found)))
    else:
        show(found)
    if drawn is not None:
        plot(found, drawn)
    return 0
