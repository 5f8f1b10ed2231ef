"""`mlm-train analyze token`, `key` and `similar`: their options, and what they print."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlm_train.utils.arguments import MODEL_KINDS, add_action, refuse_below_one
from mlm_train.utils.terminal import json_line, shown

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_TOKEN_HELP = """Show what a token opens in each layer: its top keys, its cluster, and similar tokens.
Reads the folder of `analyze keys` alone. On a shell, quote a leading space: " Paris"; #17 is the token with
id 17.

examples:
  mlm-train analyze token keys/run1 " Paris"
  mlm-train analyze token keys/run1 '#17' --top 5 --json"""

_KEY_HELP = """Show a key: the tokens that open it widest, and those that its value promotes and suppresses in
the output, by the final norm's weight and the head. Reads the model for the latter.

example:
  mlm-train analyze key keys/run1 3 17"""

_SIMILAR_HELP = """Show the tokens whose coefficients in a layer have the largest cosine with a token's.
Computes the layer for the whole vocabulary again.

example:
  mlm-train analyze similar keys/run1 " Paris" --layer 3"""


def add_queries(actions: "Actions") -> None:
    """Add the three actions."""
    token = add_action(actions, "token", "show what a token opens in each layer", _TOKEN_HELP)
    key = add_action(actions, "key", "show a key's tokens, and what its value promotes", _KEY_HELP)
    similar = add_action(actions, "similar", "show tokens with similar coefficients", _SIMILAR_HELP)
    for parser in (token, key, similar):
        parser.add_argument("folder", metavar="FOLDER", help="written by `mlm-train analyze keys`")
    for parser in (token, similar):
        parser.add_argument("token", metavar="TOKEN", help="its text, or #id")
    key.add_argument("layer", metavar="LAYER", type=int)
    key.add_argument("key", metavar="KEY", type=int)
    similar.add_argument("--layer", metavar="LAYER", type=int, required=True)
    for parser in (key, similar):
        parser.add_argument(
            "--model", metavar="MODEL", help=f"where it is now, if it has moved: {MODEL_KINDS}"
        )
    for parser in (token, key, similar):
        parser.add_argument("--top", type=int, default=10, metavar="N", help="items per list (default 10)")
        parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_token(args: argparse.Namespace) -> int:
    """Print a token's keys. Returns exit code 0."""
    refuse_below_one(args, "top")
    from mlm_train.analyze.keys.folder import KeysFolder
    from mlm_train.analyze.keys.query import token_keys

    return _print(args, token_keys(KeysFolder(args.folder), args.token, args.top), _token_lines)


def run_key(args: argparse.Namespace) -> int:
    """Print a key's tokens. Returns exit code 0."""
    refuse_below_one(args, "top")
    from mlm_train.analyze.keys.folder import KeysFolder
    from mlm_train.analyze.keys.query import key_tokens

    found = key_tokens(KeysFolder(args.folder), args.layer, args.key, args.top, args.model)
    return _print(args, found, _key_lines)


def run_similar(args: argparse.Namespace) -> int:
    """Print similar tokens. Returns exit code 0."""
    refuse_below_one(args, "top")
    from rich.console import Console
    from rich.progress import Progress

    from mlm_train.analyze.keys.folder import KeysFolder
    from mlm_train.analyze.keys.query import similar_tokens

    folder, console = KeysFolder(args.folder), Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("similar", total=folder.index.vocab_size)
        found = similar_tokens(
            folder, args.layer, args.token, args.top, args.model, lambda n: progress.advance(bar, n)
        )
    return _print(args, found, _similar_lines)


def _print(args: argparse.Namespace, found: dict[str, Any], lines: Any) -> int:
    if args.json:
        print(json_line(found))
    else:
        print(shown("\n".join(lines(found))))
    return 0


def _named(token: dict[str, Any]) -> str:
    return f"#{token['token']}" if token["text"] is None else repr(token["text"])


def _list(items: list[dict[str, Any]], value: str) -> str:
    return "  ".join(f"{_named(item)} {item[value]:.2f}" for item in items)


def _token_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"token {found['token']} {found['text']!r}"
    for layer in found["layers"]:
        cluster = layer["cluster"]
        keys = "  ".join(f"{key['key']}{'*' * key['outlier']} {key['c']:.2f}" for key in layer["keys"])
        norm, keys_open = layer["norm"], layer["effective_keys"]
        yield f"layer {layer['layer']}: {keys_open:.1f} effective keys, ||c|| {norm:.2f}"
        yield f"  keys        {keys}"
        yield f"  cluster     {cluster['cluster']} ({cluster['tokens']} tokens) {cluster['name']}"
        yield f"  neighbours  {_list(layer['neighbours'], 'cosine')}"
    if any(key["outlier"] for layer in found["layers"] for key in layer["keys"]):
        yield "* an outlier key of its layer: open for most tokens"


def _key_lines(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"layer {found['layer']} key {found['key']}{' (outlier)' * found['outlier']}: mean |c| "
        f"{found['mean_abs']:.4f}, top key of {found['usage']:,} tokens, "
        f"||W_down[:, k]|| {found['value_norm']:.3f}"
    )
    yield f"  tokens      {_list(found['tokens'], 'c')}"
    yield f"  promotes    {_list(found['promotes'], 'logit')}"
    yield f"  suppresses  {_list(found['suppresses'], 'logit')}"


def _similar_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"token {found['token']} {found['text']!r} in layer {found['layer']}, by cosine"
    yield from (f"  {one['cosine']:.4f}  {_named(one)}" for one in found["similar"])
