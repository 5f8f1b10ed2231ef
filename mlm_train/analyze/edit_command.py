"""`mlm-train analyze edit`, `edits` and `effect`: their options."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.errors import UserError
from mlm_train.utils.arguments import MODEL_KINDS, add_action, refuse_below_one
from mlm_train.utils.terminal import json_line, shown

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_EDIT_HELP = """Write a file of edits: keys of FFN-M whose coefficient is scaled for every token, or silenced.

`generate` and `evaluate` apply it with --edit FILE; left out, everything is as before: the model's files
never change. With --tol, what is written is a patch of the table instead, with the edited rows of --tokens,
for --tol-patch.

examples:
  mlm-train analyze edit exports/run1 --scale 3:17=0.5 3:42=2 --silence 0:7 --output edits.json
  mlm-train analyze edit exports/run1 --silence 3:17 --tol tol/run1 --tokens " Paris" --output a"""

_EDITS_HELP = """List what a file of edits does, a line per key.

example:
  mlm-train analyze edits edits.json"""

_EFFECT_HELP = """Show what edits change: perplexity on the validation split of --data, and the greedy
continuation of --prompt, both before and after.

examples:
  mlm-train analyze effect --model exports/run1 --edit edits.json --data data/mine
  mlm-train analyze effect --model exports/run1 --edit edits.json --prompt Once"""


def add_edits(actions: "Actions") -> None:
    """Add the three actions."""
    edit = add_action(actions, "edit", "scale or silence keys of FFN-M", _EDIT_HELP)
    edit.add_argument("model", metavar="MODEL", help=MODEL_KINDS)
    edit.add_argument(
        "--scale", nargs="+", default=[], metavar="LAYER:KEY=FACTOR", help="multiply a key's coefficient"
    )
    edit.add_argument("--silence", nargs="+", default=[], metavar="LAYER:KEY", help="the same with factor 0")
    edit.add_argument("--output", metavar="FILE", required=True, help="file to write; must not exist")
    edit.add_argument("--tol", metavar="TOL", help="write a patch of this table, which is the model's")
    edit.add_argument(
        "--tokens", nargs="+", metavar="TOKEN", help="with --tol: tokens whose rows it has, as ids or text"
    )
    edits = add_action(actions, "edits", "list what a file of edits does", _EDITS_HELP)
    edits.add_argument("file", metavar="FILE", help="written by `mlm-train analyze edit`")
    edits.add_argument("--json", action="store_true", help="print one JSON object")
    effect = add_action(actions, "effect", "show what edits change", _EFFECT_HELP)
    effect.add_argument("--model", metavar="MODEL", required=True, help=MODEL_KINDS)
    effect.add_argument(
        "--edit", action="append", required=True, metavar="FILE", help="edits; may be repeated"
    )
    effect.add_argument("--data", metavar="DATA", help="folder written by `data prepare`")
    effect.add_argument("--samples", type=int, metavar="N", help="windows of --data (default: all)")
    effect.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens per window (default: the most)"
    )
    effect.add_argument("--prompt", metavar="TEXT", help="text to continue")
    effect.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="default 32")
    effect.add_argument("--json", action="store_true", help="print one JSON object")


def run_edit(args: argparse.Namespace) -> int:
    """Write edits, or a patch of a table. Returns exit code 0."""
    if bool(args.tol) != bool(args.tokens):
        raise UserError("give --tol and --tokens together, or neither")
    if not args.scale and not args.silence:
        raise UserError("give keys to edit: --scale LAYER:KEY=FACTOR or --silence LAYER:KEY")
    out = Path(args.output)
    if out.exists():
        raise UserError(f"--output {out} exists already and nothing is overwritten: choose another name")
    from mlm_train.analyze.edit import as_patch, make_edits, scale_of
    from mlm_train.utils.files import write_json, writing

    for option, texts, has_factor in (("--scale", args.scale, True), ("--silence", args.silence, False)):
        if wrong := next((text for text in texts if ("=" in text) != has_factor), None):
            form = "LAYER:KEY=FACTOR" if has_factor else "LAYER:KEY"
            raise UserError(f"{option} {wrong!r}: give {form}")
    scales = [scale_of(text) for text in (*args.scale, *args.silence)]
    edits, model = make_edits(args.model, scales)
    if args.tol is not None:
        patch = as_patch(edits, model, args.tol, args.tokens)
        with writing(out):
            patch.write(out, Path(args.tol))
        print(*map(shown, patch.done), f"{out}: apply it with --tol {args.tol} --tol-patch {out}", sep="\n")
        return 0
    with writing(out):
        write_json(out, edits.model_dump())
    print(*edits.scales, f"{out}: apply it with --edit {out}", sep="\n")
    return 0


def run_edits(args: argparse.Namespace) -> int:
    """List edits. Returns exit code 0."""
    from mlm_train.checkpoint.reading.edits import Edits

    edits = Edits.read(args.file)
    print(json_line(edits.model_dump()) if args.json else "\n".join(map(str, edits.scales)))
    return 0


def run_effect(args: argparse.Namespace) -> int:
    """Measure and print. Returns exit code 0."""
    if args.data is None and args.prompt is None:
        raise UserError("give --data, --prompt, or both: what the effect is measured on")
    refuse_below_one(args, "samples", "sequence_length", "max_new_tokens")
    from mlm_train.analyze.edit import effect

    found = effect(
        args.model, args.edit, args.data, args.samples, args.sequence_length, args.prompt, args.max_new_tokens
    )
    if args.json:
        print(json_line(found))
        return 0
    for name, values in found.items():
        for when, value in values.items():
            print(
                f"{name:10s} {when:6s} {f'{value:.4f}' if isinstance(value, float) else shown(repr(value))}"
            )
    return 0
