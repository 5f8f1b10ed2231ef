"""`mlm-train analyze shares`: its options, and its table on the terminal."""

import argparse
from typing import TYPE_CHECKING, Any

from mlm_train.utils.arguments import MODEL_KINDS, add_action, refuse_below_one
from mlm_train.utils.terminal import json_line

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_HELP = """Show what attention, FFN-C (a base model's FFN) and FFN-M add to the residual stream in each layer,
over the validation split of --data.

Of each part: the norm of what it adds / the norm of what the layer adds, and its share of that: its
projection on what the layer adds, so that the shares of a layer sum to 1.

example:
  mlm-train analyze shares --model exports/run1 --data data/mine --samples 64 --json"""


def add_shares(actions: "Actions") -> None:
    """Add the action."""
    parser = add_action(actions, "shares", "show what each part adds to the residual stream", _HELP)
    parser.add_argument("--model", metavar="MODEL", required=True, help=MODEL_KINDS)
    parser.add_argument("--data", metavar="DATA", required=True, help="folder written by `data prepare`")
    parser.add_argument("--samples", type=int, metavar="N", help="windows of --data (default: all)")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens per window (default: the most)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_shares(args: argparse.Namespace) -> int:
    """Measure and print. Returns exit code 0."""
    refuse_below_one(args, "samples", "sequence_length")
    from mlm_train.analyze.hooks import shares
    from mlm_train.evaluate.scorer import Scorer

    length, count = args.sequence_length, args.samples
    scorer = Scorer(args.model, args.data, length=length, count=count, with_memory=True)
    about = {"model": scorer.fingerprint, "data": scorer.data.fingerprint} if args.json else {}
    layers = shares(scorer.model, scorer.computed, scorer.windows.batches(show=True))
    if args.json:
        size = {"windows": scorer.windows.count, "length": scorer.windows.samples.sequence_length}
        print(json_line({**about, **size, "layers": layers}))
        return 0
    for layer in layers:
        print(f"layer {layer['layer']:<3d} adds {layer['update']:8.3f}  {'  '.join(_parts(layer))}")
    return 0


def _parts(layer: dict[str, Any]) -> list[str]:
    from mlm_train.analyze.hooks import PARTS

    return [
        f"{name} ratio {layer[name]['ratio']:.3f} share {layer[name]['share']:.3f}"
        for name in PARTS
        if name in layer
    ]
