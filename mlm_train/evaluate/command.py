"""`mlm-train evaluate`: perplexity of a model, or its logits."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError
from mlm_train.tol.serve.arguments import add_counters_argument, add_tol_arguments, counted, store_options
from mlm_train.utils.arguments import MODEL_KINDS, add_edit_argument, refuse_below_one
from mlm_train.utils.checks import add_verify

if TYPE_CHECKING:
    from mlm_train.evaluate.scorer import Scorer

HELP = """Perplexity of a model on prepared data, with FFN-M computed or read from a ToL;
or its logits for given tokens.

examples:
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data --tol runs/micro-tol
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data --baselines runs/micro
  mlm-train evaluate --model runs/micro-export --tokens ids.safetensors --dump-logits out.safetensors"""


CHUNK_WINDOWS = 4096  # windows counted at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", required=True, help=MODEL_KINDS)
    parser.add_argument("--data", help="folder written by `data prepare`")
    parser.add_argument("--split", default="validation", choices=("train", "validation"))
    parser.add_argument("--sequence-length", type=int, help="tokens per window; default: the model's maximum")
    parser.add_argument("--samples", type=int, help="number of windows, from the first; default: all")
    parser.add_argument(
        "--micro-batch-size", type=int, default=8, help="windows per forward pass (default 8)"
    )
    add_tol_arguments(parser)
    add_edit_argument(parser)
    add_counters_argument(parser)
    parser.add_argument(
        "--baselines",
        metavar="RUN",
        help="also unigram and bigram perplexity, counted on the tokens RUN trained on",
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="put the begin-of-text token before each window of data prepared without it (default: if the "
        "model was trained with it)",
    )
    add_verify(parser, "the model, --data and --tol", "full; sizes for --data and --tol")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--tokens", help="safetensors file with `tokens` int64 [batch, sequence]")
    parser.add_argument("--dump-logits", metavar="FILE", help="write their logits there")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    if bool(args.tokens) != bool(args.dump_logits) or bool(args.tokens) == bool(args.data):
        raise UserError("give either --data, or --tokens with --dump-logits")
    refuse_below_one(args, "sequence_length", "samples", "micro_batch_size")
    if args.tokens:
        if args.add_bos is not None:
            raise UserError("--add-bos has no effect on --tokens: write the id there")
        from mlm_train.evaluate.logits import dump_logits

        dump_logits(Path(args.model), Path(args.tokens), Path(args.dump_logits), args.verify or "full")
        print(f"wrote {args.dump_logits}")
        return 0
    result = _perplexities(args)
    if args.json:
        print(json.dumps(result))
        return 0
    for name, value in result.items():
        print(f"{name:24s} {value:,.4f}" if isinstance(value, float) else f"{name:24s} {value:,}")
    return 0


def _perplexities(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_train.checkpoint.reading.edits import read_edits
    from mlm_train.evaluate.scorer import Scorer
    from mlm_train.tol.format.index_file import read_index

    options = replace(store_options(args), verify=args.verify or "sizes")
    scorer = Scorer(
        args.model,
        args.data,
        args.split,
        args.sequence_length,
        args.samples,
        args.micro_batch_size,
        with_memory=args.tol is None,
        verify=args.verify,
        add_bos=args.add_bos,
        embeds=args.tol is None or read_index(args.tol).embedding is None,
    )
    for edits in read_edits(args.edit, scorer.folder, args.tol):
        edits.apply(scorer.model)
    if args.tol is None:
        scored = scorer.score(scorer.computed)
    else:
        from mlm_train.tol.serve.source import TolSource

        source = TolSource.of_model(args.tol, scorer.folder, options, patches=args.tol_patch)
        with counted(source, args.tensorboard) as after_batch:
            scored = scorer.score(source, after_batch)
    result = {"loss": scored.loss, "perplexity": scored.perplexity, "tokens": scored.tokens}
    result["windows"] = scorer.windows.count
    if args.baselines:
        result |= _baselines(args, scorer)
    return result


def _baselines(args: argparse.Namespace, scorer: "Scorer") -> dict[str, float]:
    """Unigram and bigram perplexity, counted on exactly the tokens that a run was trained on."""
    from mlm_train.checkpoint.folders import resolve
    from mlm_train.checkpoint.load import config_of, open_checkpoint
    from mlm_train.data.samples import Samples
    from mlm_train.evaluate.baselines import BigramCounts

    data, windows = scorer.data, scorer.windows
    manifest = open_checkpoint(resolve(Path(args.baselines)), "sizes")
    if manifest.data.fingerprint != data.fingerprint:
        raise UserError(f"--baselines {args.baselines} was not trained on {args.data} (fingerprints differ)")
    config = config_of(manifest)
    trained = Samples(data.split("train"), config.data.sequence_length, config.train.seed)
    counts = BigramCounts(data.vocab_size)
    seen = manifest.progress.samples
    for start in range(0, seen, CHUNK_WINDOWS):
        counts.add(trained.windows(range(start, min(seen, start + CHUNK_WINDOWS))))
    baselines = counts.perplexities(windows.tokens(range(windows.count)).numpy())
    return {"unigram": baselines.unigram, "bigram": baselines.bigram}
