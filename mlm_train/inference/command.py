"""`mlm-train generate`: continue a prompt, with FFN-M computed or looked up."""

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mlm_train.errors import UserError
from mlm_train.tol.serve.arguments import add_tol_arguments, open_tol
from mlm_train.utils.arguments import MODEL_KINDS, seed
from mlm_train.utils.checks import add_verify
from mlm_train.utils.terminal import json_line, shown

if TYPE_CHECKING:
    from mlm_train.checkpoint.reading.logical_folder import ModelFolder
    from mlm_train.data.tokenizer import Tokenizer
    from mlm_train.inference.decode import Decoder

HELP = """Continue a prompt. With --tol, FFN-M's weights are never loaded: its output is looked up.
Ends at any of the model's end tokens. On a terminal, control characters in the text are shown escaped.

examples:
  mlm-train generate --model exports/run1 --prompt "Once upon a time"
  mlm-train generate --model exports/run1 --tol tol/run1 --prompt "Once" --temperature 0.8 --top-p 0.95
  mlm-train generate --model exports/run1 --prompt-ids 17,4,256 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for model, prompt and sampling."""
    parser.add_argument("--model", metavar="MODEL", required=True, help=MODEL_KINDS)
    add_tol_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text, for the tokenizer of the export or the run")
    prompt.add_argument(
        "--prompt-ids",
        metavar="IDS",
        help="token ids such as 1,2,3; the output is ids too, and no tokenizer is needed",
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="put the begin-of-text token before --prompt (default: if the model was trained with it)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        default=64,
        help="maximum new tokens (default %(default)s); an end token or a full context ends earlier",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", default=0.0, help="0 (default): the most likely token"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=1.0,
        help="sample from the most likely tokens with this total probability",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (default %(default)s)")
    add_verify(parser, "the model and --tol", "full; sizes for --tol")
    parser.add_argument("--json", action="store_true", help="write one JSON object instead of streaming")
    parser.add_argument(
        "--stats", action="store_true", help="with --tol: also its rows, hits, bytes and waits, to stderr"
    )


def run(args: argparse.Namespace) -> int:
    """Stream the new tokens, or write {"ids", "text", "prefill_ms", "decode_ms_per_token"}."""
    from mlm_train.checkpoint.reading.logical_folder import find_model
    from mlm_train.tol.serve.source import TolSource

    if args.stats and args.tol is None:
        raise UserError("--stats counts rows of a table: give --tol TOLDIR too")
    prompt = [] if args.prompt_ids is None else _ids(args.prompt_ids)
    folder, tokenizer = find_model(args.model, args.verify or "full"), None
    if args.prompt_ids is None:
        tokenizer = folder.tokenizer()
        bos_id = folder.id_before_text(args.add_bos, folder.home)
        prompt = [*([] if bos_id is None else [bos_id]), *tokenizer.encode(args.prompt)]
    elif args.add_bos is not None:
        raise UserError("--add-bos has no effect on --prompt-ids: write the id there")
    decoder = _decoder(folder, args)
    stop_ids = {*folder.ends, *_eod_ids(tokenizer)}
    tokens = decoder.generate(prompt, args.max_new_tokens, args.temperature, args.top_p, args.seed, stop_ids)
    ids = list(tokens) if args.json else _stream(tokens, prompt, tokenizer)
    timing = decoder.timing
    if args.json:
        text = _continuation(tokenizer, prompt, ids) if tokenizer is not None else None
        result = {"ids": ids, "text": text, "prefill_ms": timing.prefill_ms}
        print(json_line(result | {"decode_ms_per_token": timing.decode_ms_per_token}))
    if len(ids) == decoder.room(prompt) < args.max_new_tokens:
        context = decoder.model.config.max_position_embeddings
        what = f"{len(ids)} of {args.max_new_tokens} new tokens"
        print(f"{what}: the model's context of {context} tokens is full", file=sys.stderr)
    if not args.json:
        decode = timing.decode_ms_per_token
        then = f", then {decode:.2f} ms per token" if decode is not None else ""
        print(f"prefill of {len(prompt)} tokens {timing.prefill_ms:.1f} ms{then}", file=sys.stderr)
    if isinstance(decoder.source, TolSource) and args.stats:
        print(decoder.source.store.counters, file=sys.stderr)
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise UserError(f"--prompt-ids {text!r}: give whole numbers such as 1,2,3") from None


def _decoder(folder: "ModelFolder", args: argparse.Namespace) -> "Decoder":
    from mlm_train.checkpoint.reading.logical_folder import load_model
    from mlm_train.inference.decode import Decoder
    from mlm_train.memory import make_source

    if args.tol is not None:
        # First, so that a bad table fails before the weights are loaded.
        source = open_tol(args, folder, args.verify or "sizes")
        return Decoder(load_model(folder, with_memory=False), source)
    model = load_model(folder)
    return Decoder(model, make_source("unique", model.memory_blocks()) if model.config.has_memory else None)


def _eod_ids(tokenizer: "Tokenizer | None") -> list[int]:
    """The end-of-document id, in a list; empty where the tokenizer has none."""
    try:
        return [] if tokenizer is None else [tokenizer.eod_id]
    except UserError:
        return []


def _continuation(tokenizer: "Tokenizer", prompt: list[int], ids: list[int]) -> str:
    """The new text. Decoded together with the prompt, else the space between them would be lost."""
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


def _stream(tokens: Iterable[int], prompt: list[int], tokenizer: "Tokenizer | None") -> list[int]:
    """Print each token as it is generated. Returns the tokens."""
    ids: list[int] = []
    written = 0
    for token in tokens:
        ids.append(token)
        if tokenizer is None:
            print(f",{token}" if len(ids) > 1 else token, end="", flush=True)
            continue
        text = _continuation(tokenizer, prompt, ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # an incomplete character
            print(shown(text[written:]), end="", flush=True)
            written = len(text)
    if tokenizer is not None:
        print(shown(_continuation(tokenizer, prompt, ids)[written:]), end="")
    print()
    return ids
