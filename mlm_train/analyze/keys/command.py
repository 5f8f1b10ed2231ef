"""`mlm-train analyze keys`: its options and its table on the terminal."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlm_train.errors import UserError
from mlm_train.utils.arguments import MODEL_KINDS, add_action, layers_in, refuse_below_one, seed
from mlm_train.utils.checks import add_verify
from mlm_train.utils.terminal import json_line, shown

if TYPE_CHECKING:
    from mlm_train.analyze.keys.folder import Statistics
    from mlm_train.utils.arguments import Actions

_HELP = """Find which keys of FFN-M every token of the vocabulary opens, layer by layer.

Writes the top keys of each token, the top tokens of each key, clusters of tokens with names, keys that stand
out, and a map of tokens, for `analyze token`, `key`, `similar` and `projector`. FFN-M is computed for some
tokens at a time: one layer's weights are in memory. A killed analysis goes on with the next layer: run the
same command again. Needs scikit-learn (pip install 'mlm-train[analyze]').

examples:
  mlm-train analyze keys --model exports/run1 --output keys/run1
  mlm-train analyze keys --model runs/micro --output keys/micro --layers 0-3 --clusters 16 --map-tokens 0"""


def add_keys(actions: "Actions") -> None:
    """Add the action."""
    parser = add_action(actions, "keys", "find the keys of FFN-M that every token opens", _HELP)
    parser.add_argument("--model", metavar="MODEL", required=True, help=MODEL_KINDS)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write; new or unfinished")
    parser.add_argument("--layers", metavar="LAYERS", help="these alone, such as 3,5-7 (default: all)")
    parser.add_argument(
        "--top-k", type=int, default=32, metavar="K", help="keys of a token, and tokens of a key (default 32)"
    )
    parser.add_argument(
        "--clusters", type=int, default=64, metavar="N", help="clusters of tokens per layer (default 64)"
    )
    parser.add_argument(
        "--map-tokens",
        type=int,
        default=20_000,
        metavar="N",
        help="tokens on a layer's map, drawn at random (default 20000, the most); 0: no map",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the clusters, samples and maps (default 0)")
    parser.add_argument("--json", action="store_true", help="print a JSON object per layer")
    add_verify(parser, "the model")


def run_keys(args: argparse.Namespace) -> int:
    """Analyse, and print a line per layer. Returns exit code 0."""
    from mlm_train.analyze.extra import require

    require("sklearn", "scikit-learn", "analyze keys")
    if not 0 <= args.map_tokens <= 20_000:
        raise UserError(f"--map-tokens {args.map_tokens}: give 0 to 20000")
    refuse_below_one(args, "top_k", "clusters")
    from mlm_train.analyze.keys.analysis import analyse_keys
    from mlm_train.analyze.keys.folder import Settings
    from mlm_train.checkpoint.reading.logical_folder import read_model_config

    layers = None
    if args.layers is not None:
        known = range(read_model_config(args.model).num_hidden_layers)
        layers = sorted(layers_in("--layers", args.layers, known))
    settings = Settings(top_k=args.top_k, clusters=args.clusters, map_tokens=args.map_tokens, seed=args.seed)
    found = analyse_keys(args.model, args.output, settings, layers, args.verify or "full")
    if args.json:
        for statistics in found:
            print(json_line(statistics.model_dump()), flush=True)
        return 0
    print(shown(_table(list(found))))
    print(f"wrote {args.output}")
    return 0


def _table(layers: Sequence["Statistics"]) -> str:
    head = (
        "layer",
        "mean |c|",
        "keys/token",
        "share",
        "unused",
        "outliers",
        "explained",
        "silhouette",
        "coeff.",
    )
    lines = ["".join(f"{word:>12s}" for word in head)]
    for one in layers:
        score = "-" if one.silhouette is None else f"{one.silhouette:.3f}"
        lines.append(
            f"{one.layer:12d}{one.mean_abs:12.4f}{one.mean_effective_keys:12.1f}{one.mean_share:12.3f}"
            f"{one.unused_keys:12d}{len(one.outlier_keys):12d}{one.explained:12.3f}{score:>12s}"
            f"{one.clustering_coefficient:12.3f}"
        )
    return "\n".join(lines)
