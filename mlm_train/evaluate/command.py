"""`mlm-train evaluate`: perplexity of an export, or its logits."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.data.tokenizer import FILE_OF_KIND
from mlm_train.errors import UserError
from mlm_train.files import sha256_of

if TYPE_CHECKING:
    from mlm_train.config import ModelConfig
    from mlm_train.data.prepared import PreparedData
    from mlm_train.data.samples import Samples

HELP = """Perplexity of an exported model on prepared data, with FFN-M computed or read from a ToL;
or its logits for given tokens.

examples:
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data --tol runs/micro-tol
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data --baselines runs/micro
  mlm-train evaluate --model runs/micro-export --tokens ids.safetensors --dump-logits out.safetensors"""


CHUNK_WINDOWS = 4096  # windows counted at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", required=True, help="export folder")
    parser.add_argument("--data", help="folder written by `data prepare`")
    parser.add_argument("--split", default="validation", choices=("train", "validation"))
    parser.add_argument("--sequence-length", type=int, help="tokens a window; default: the model's longest")
    parser.add_argument("--samples", type=int, help="windows, the first ones; default: all")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows a forward pass (default 8)")
    parser.add_argument("--tol", help="ToL folder: FFN-M is looked up, its weights are never loaded")
    parser.add_argument(
        "--baselines", metavar="RUN", help="also unigram and bigram, counted on the tokens RUN trained on"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--tokens", help="safetensors file with `tokens` int64 [batch, sequence]")
    parser.add_argument("--dump-logits", metavar="FILE", help="write their logits there")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    if bool(args.tokens) != bool(args.dump_logits) or bool(args.tokens) == bool(args.data):
        raise UserError("give either --data, or --tokens with --dump-logits")
    if args.tokens:
        from mlm_train.evaluate.logits import dump_logits

        dump_logits(Path(args.model), Path(args.tokens), Path(args.dump_logits))
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
    from rich.console import Console
    from rich.progress import track

    from mlm_train.checkpoint.hf_folder import load_model, read_config
    from mlm_train.data.prepared import PreparedData
    from mlm_train.evaluate.perplexity import measure_perplexity
    from mlm_train.memory import make_source
    from mlm_train.model.source import MemorySource

    folder = Path(args.model)
    data = PreparedData.open(args.data)
    config = read_config(folder)
    check_tokenizer(folder, data)
    length = config.max_position_embeddings if args.sequence_length is None else args.sequence_length
    _check_numbers(args, length, config, data)
    samples, count = _windows(data, args.split, length, args.samples)
    source: MemorySource | None = None
    model = load_model(folder, with_memory=args.tol is None)
    if args.tol is not None:
        from mlm_train.tol.store import TolSource

        source = TolSource.open_folder(args.tol, config)
    elif config.has_memory:
        source = make_source("unique", model.memory_blocks())
    starts = track(
        range(0, count, args.micro_batch),
        description="evaluate",
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    batches = (samples.batch(start, min(args.micro_batch, count - start)) for start in starts)
    found = measure_perplexity(model, source, batches)
    result = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens, "windows": count}
    if args.baselines:
        result |= _baselines(args, data, samples, count)
    return result


def _check_numbers(
    args: argparse.Namespace, length: int, config: "ModelConfig", data: "PreparedData"
) -> None:
    for name in ("sequence_length", "samples", "micro_batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")
    if length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length {length} is longer than the model's "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    if data.vocab_size > config.vocab_size:
        raise UserError(
            f"{args.data} has {data.vocab_size} ids and {args.model} knows {config.vocab_size}: "
            "prepare the data with the model's tokenizer"
        )


def check_tokenizer(folder: Path, data: "PreparedData") -> None:
    """Refuse data whose ids come from another tokenizer than the export's own."""
    name, expected = data.manifest.tokenizer.file, data.manifest.tokenizer.sha256
    kinds = [folder / file for file in FILE_OF_KIND.values() if (folder / file).is_file()]
    if kinds and (kinds[0].name != name or sha256_of(kinds[0]) != expected):
        raise UserError(
            f"{kinds[0]} is not the tokenizer of {data.path} (hashes differ): "
            "prepare the data with the model's tokenizer"
        )


def _windows(data: "PreparedData", split: str, length: int, wanted: int | None) -> tuple["Samples", int]:
    """Windows in order, and how many of them to take."""
    from mlm_train.data.samples import Samples

    samples = Samples(data.split(split), length, None)
    count = samples.samples_per_epoch
    return samples, count if wanted is None else min(wanted, count)


def _baselines(
    args: argparse.Namespace, data: "PreparedData", samples: "Samples", count: int
) -> dict[str, float]:
    """Unigram and bigram perplexity, counted on exactly the tokens that a run has trained on."""
    from mlm_train.checkpoint.folders import resolve
    from mlm_train.checkpoint.load import config_of, open_checkpoint
    from mlm_train.data.samples import Samples
    from mlm_train.evaluate.baselines import BigramCounts

    manifest = open_checkpoint(resolve(Path(args.baselines)), hashes=False)
    if manifest["data"]["fingerprint"] != data.fingerprint:
        raise UserError(f"--baselines {args.baselines} was not trained on {args.data} (fingerprints differ)")
    config = config_of(manifest)
    trained = Samples(data.split("train"), config.data.sequence_length, config.train.seed)
    counts = BigramCounts(data.vocab_size)
    seen = manifest["progress"]["samples"]
    for start in range(0, seen, CHUNK_WINDOWS):
        counts.add(trained.windows(range(start, min(seen, start + CHUNK_WINDOWS))))
    found = counts.perplexities(samples.windows(range(count)))
    return {"unigram": found.unigram, "bigram": found.bigram}
