"""`mlm-train generate`: continue prompts, with FFN-M computed or looked up."""

import argparse
import dataclasses
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError
from mlm_train.inference.arguments import add_scale_arguments, language_model, numbers
from mlm_train.tol.serve.arguments import add_counters_argument, add_tol_arguments, counted
from mlm_train.utils.arguments import MODEL_KINDS, add_edit_argument, refuse_below_one, seed
from mlm_train.utils.checks import add_verify
from mlm_train.utils.files import check_output
from mlm_train.utils.terminal import json_line, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlm_train.inference.generation import Generation
    from mlm_train.inference.language_model import LanguageModel
    from mlm_train.inference.sampling import Sampling

HELP = """Continue a prompt, or all of a file. With --tol, FFN-M's weights are never loaded: its output is
looked up. Ends at any of the model's end tokens. On a terminal, control characters in the text are shown
escaped.

examples:
  mlm-train generate --model exports/run1 --prompt "Once upon a time"
  mlm-train generate --model exports/run1 --tol tol/run1 --prompt "Once" --temperature 0.8 --top-p 0.95
  mlm-train generate --model exports/run1 --prompt "Q: " --stop "Q:" --stop "A:" --drop-layers 0,3
  mlm-train generate --model exports/run1 --prompts questions.txt --batch-size 32 > answers.jsonl
  mlm-train generate --model exports/run1 --prompt-ids 17,4,256 --json --logprobs 5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for model, prompt, sampling and output."""
    _add_model(parser)
    _add_prompt(parser)
    _add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="write one JSON object instead of streaming")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", required=True, help=MODEL_KINDS)
    add_tol_arguments(parser)
    add_counters_argument(parser)
    add_edit_argument(parser)
    parser.add_argument(
        "--stats", action="store_true", help="with --tol: also its rows, hits, bytes and waits, to stderr"
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write when layers were computed and rows were read, for Perfetto or chrome://tracing",
    )
    add_verify(parser, "the model and --tol", "full; sizes for --tol")
    add_scale_arguments(parser)


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text, for the tokenizer of the export or the run")
    prompt.add_argument(
        "--prompt-ids",
        metavar="IDS",
        help="token ids such as 1,2,3; the output is ids too, and no tokenizer is needed",
    )
    prompt.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='a prompt per line, or a .jsonl with a field "prompt"; writes a JSON object for each, in order',
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts of --prompts decoded together (default 16)"
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="put the begin-of-text token before texts (default: if the model was trained with it)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
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
        "--top-k", type=int, metavar="K", default=0, help="sample from the K most likely tokens; 0: from all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=1.0,
        help="sample from the most likely tokens with this total probability",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        default=1.0,
        help="makes tokens of the prompt and the new text less likely if over 1, as in transformers",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of the sampling of each prompt (default %(default)s)"
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", default=[], help="end before this text; repeatable"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model's end tokens")
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json or --prompts: each new token's log-probability, and the N most likely tokens'",
    )


def run(args: argparse.Namespace) -> int:
    """Stream the new tokens, write one JSON object, or one for each of --prompts."""
    if args.stats and args.tol is None:
        raise UserError("--stats counts rows of a table: give --tol TOLDIR too")
    if args.prompt_ids is not None and args.add_bos is not None:
        raise UserError("--add-bos has no effect on --prompt-ids: write the id there")
    if args.batch_size is not None and not args.prompts:
        raise UserError("--batch-size has no effect without --prompts; leave it out")
    refuse_below_one(args, "batch_size", "max_new_tokens")
    if args.logprobs is not None and not args.json and not args.prompts:
        raise UserError("--logprobs has no effect on text; add --json")
    if args.trace is not None:
        from mlm_train.utils.trace import is_trace

        check_output("--trace", args.trace, is_trace, "trace")
    from mlm_train.inference.sampling import Sampling
    from mlm_train.tol.serve.source import TolSource

    names = [field.name for field in dataclasses.fields(Sampling) if hasattr(args, field.name)]
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    model = _run_file(args, sampling) if args.prompts else _run_one(args, sampling)
    if args.stats and isinstance(model.decoder.source, TolSource):
        print(model.decoder.source.store.counters, file=sys.stderr)
    return 0


def _run_file(args: argparse.Namespace, sampling: "Sampling") -> "LanguageModel":
    from mlm_train.inference.language_model import BATCH_SIZE
    from mlm_train.inference.prompts import read_prompts

    prompts = read_prompts(args.prompts)
    model = language_model(args, False, "tensorboard")
    generations = []
    for prompt, place in prompts:
        try:
            generations.append(model.begin(prompt, sampling))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    size = BATCH_SIZE if args.batch_size is None else args.batch_size
    with _watched(args, model) as after_batch:
        completions = model.complete(generations, size, after_batch)
        for (prompt, _), completion, generation in zip(prompts, completions, generations, strict=True):
            print(json_line({"prompt": prompt, "text": completion.text, **_tree(generation)}), flush=True)
    return model


@contextmanager
def _watched(args: argparse.Namespace, model: "LanguageModel") -> "Iterator[Callable[[], None]]":
    """Write --trace and --tensorboard of the body; yields what it calls after each batch."""
    trace = nullcontext() if args.trace is None else model.trace(args.trace)
    with trace, counted(model.decoder.source, args.tensorboard) as after_batch:
        yield after_batch


def _run_one(args: argparse.Namespace, sampling: "Sampling") -> "LanguageModel":
    by_ids = args.prompt_ids is not None
    prompt = numbers(int, args.prompt_ids, "--prompt-ids") if by_ids else args.prompt
    model = language_model(args, by_ids, "tensorboard")
    generation = model.begin(prompt, sampling)
    with _watched(args, model) as after_batch:
        if args.json:
            for _ in model.decoder.run([generation]):
                pass
        elif by_ids:
            _stream_ids(model, generation)
        else:
            for piece in model.pieces(generation):
                print(shown(piece), end="", flush=True)
            print()
        after_batch()
    timing, count = model.decoder.timing, len(generation.ids)
    if args.json:
        text = None if generation.text is None else generation.text.text
        times = {"prefill_ms": timing.prefill_ms, "decode_ms_per_token": timing.decode_ms_per_token}
        print(json_line({"text": text, **_tree(generation), **times}))
    if generation.finish_reason == "length" and count < sampling.max_new_tokens:
        context = model.decoder.model.config.max_position_embeddings
        what = f"{count} of {sampling.max_new_tokens} new tokens"
        print(f"{what}: the model's context of {context} tokens is full", file=sys.stderr)
    if not args.json:
        decode = timing.decode_ms_per_token
        then = f", then {decode:.2f} ms per token" if decode is not None else ""
        prefill = f"prefill of {len(generation.prompt)} tokens {timing.prefill_ms:.1f} ms"
        print(prefill + then, file=sys.stderr)
    return model


def _stream_ids(model: "LanguageModel", generation: "Generation") -> None:
    """Print each id as it is generated, with commas between them."""
    written = 0
    for _ in model.decoder.run([generation]):
        for token in generation.ids[written:]:
            print(f",{token}" if written else token, end="", flush=True)
            written += 1
    print()


def _tree(generation: "Generation") -> dict[str, Any]:
    """The JSON of what has been generated, but for its text."""
    tree: dict[str, Any] = {"ids": generation.ids, "finish_reason": generation.finish_reason}
    if generation.logprobs is not None:
        tree["logprobs"] = [logprob._asdict() for logprob in generation.logprobs]
    return tree
