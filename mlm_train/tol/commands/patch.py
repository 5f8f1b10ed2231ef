"""`mlm-train tol patch`: make a patch of a table's rows, and list what one does."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.errors import UserError
from mlm_train.utils.arguments import MODEL_KINDS, add_action, layers_in

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_HELP = """Edit what tokens recall, without touching the table.

A patch holds the changed rows of some tokens. `generate` and `evaluate` apply it with --tol-patch FILE; left
out, everything is as before. Changes are made in the order --rows, --copy, --scale, --silence; a TOKEN is an
id, or with --model its text."""

_CREATE_HELP = """Write a patch.

examples:
  mlm-train tol patch create tol/run1 --output calm.safetensors --scale 17=0.5 --silence 42 43
  mlm-train tol patch create tol/run1 --model exports/run1 --output swap.safetensors --copy " Paris"=" Rome"
  mlm-train tol patch create tol/run1 --output deep.safetensors --layers 8-11 --silence 42"""

_LIST_HELP = """List what a patch does, a line per change.

example:
  mlm-train tol patch list calm.safetensors"""


def add_patch(actions: "Actions") -> None:
    """Add the action and its own actions."""
    parser = add_action(actions, "patch", "edit, scale or silence tokens, beside the table", _HELP)
    own = parser.add_subparsers(dest="patch_action", metavar="ACTION", required=True)
    create = add_action(own, "create", "write a patch", _CREATE_HELP)
    create.add_argument("table", metavar="TOL", help="folder written by `mlm-train tol build`")
    create.add_argument("--output", metavar="FILE", required=True, help="the patch; must not exist")
    create.add_argument("--model", metavar="MODEL", help=f"for tokens as text: {MODEL_KINDS}")
    create.add_argument("--layers", metavar="LAYERS", help="change these alone, such as 3,5-7")
    create.add_argument(
        "--scale", nargs="+", default=[], metavar="TOKEN=FACTOR", help="multiply a token's row"
    )
    create.add_argument("--silence", nargs="+", default=[], metavar="TOKEN", help="set a token's row to zero")
    create.add_argument(
        "--copy", nargs="+", default=[], metavar="TOKEN=OTHER", help="give a token the row of another"
    )
    create.add_argument("--rows", metavar="FILE", help="safetensors: ids int64 [n], rows [n, layers, hidden]")
    add_action(own, "list", "list what a patch does", _LIST_HELP).add_argument("patch", metavar="PATCH")


def run_patch(args: argparse.Namespace) -> int:
    """Write or list a patch. Returns exit code 0."""
    if args.patch_action == "list":
        from mlm_train.tol.serve.patch import operations

        print(*operations(args.patch), sep="\n")
        return 0
    from mlm_train.checkpoint.reading.logical_folder import find_model
    from mlm_train.tol.format.index_file import read_index
    from mlm_train.tol.tools.patch import PatchMaker
    from mlm_train.tol.tools.vocabulary import Vocabulary
    from mlm_train.utils.files import writing

    table, output = Path(args.table), Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} exists already and nothing is overwritten: choose another name")
    index = read_index(table)
    model = None if args.model is None else find_model(args.model, "sizes")
    layers = None if args.layers is None else sorted(layers_in("--layers", args.layers, index.layers))
    maker = PatchMaker(table, Vocabulary.of(index.vocab_size, model), layers)
    if args.rows is not None:
        maker.replace(args.rows)
    for text in args.copy:
        maker.copy(*_pair("--copy", text))
    for text in args.scale:
        token, factor = _pair("--scale", text)
        maker.scale(token, _number("--scale", text, factor))
    for token in args.silence:
        maker.silence(token)
    patch = maker.made()
    with writing(output):
        patch.write(output, table)
    print(*patch.done, sep="\n")
    tokens = f"{len(patch.ids)} token{'' if len(patch.ids) == 1 else 's'}"
    print(f"{output}: {tokens} of {table}; apply it with --tol-patch {output}")
    return 0


def _pair(option: str, text: str) -> tuple[str, str]:
    token, equals, value = text.rpartition("=")
    if not equals or not token:
        raise UserError(f"{option} {text!r}: give TOKEN=VALUE, such as 17=0.5")
    return token, value


def _number(option: str, text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not abs(number) < 1e6:
        raise UserError(f"{option} {text!r}: the factor must be a number, such as 0.5")
    return number
