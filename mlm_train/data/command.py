"""`mlm-train data collect | synthetic | prepare | inspect`."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.errors import escaped
from mlm_train.utils.arguments import add_action, seed
from mlm_train.utils.checks import add_verify
from mlm_train.utils.units import size

if TYPE_CHECKING:
    from mlm_train.data.prepare import Progress

HELP = """Collect or invent text, tokenize it for training, inspect the result.

examples:
  mlm-train data collect --output runs/corpus
  mlm-train data synthetic --output runs/synthetic
  mlm-train data prepare --input runs/corpus --output runs/data --tokenizer train:4096
  mlm-train data inspect runs/data
"""

COLLECT_HELP = """Gather a corpus without a download: the text files of Python's standard library
(or of --source folders), without duplicates, as train.jsonl and validation.jsonl.

example:
  mlm-train data collect --output runs/corpus --max-bytes 10MB
"""

SYNTHETIC_HELP = """Write training text and questions of four tasks that small models can learn: recall of
facts about invented people, copying, induction, and arithmetic. The text is train.jsonl and
validation.jsonl, for `data prepare` and a blend; the questions are tasks of lm-evaluation-harness, for
`evaluate --tasks`.

examples:
  mlm-train data synthetic --output runs/synthetic
  mlm-train data prepare --input runs/synthetic --output runs/synthetic-data --tokenizer runs/data
  mlm-train evaluate --model runs/mixed --tasks synthetic --include-path runs/synthetic
"""

PREPARE_HELP = """Tokenize text files, JSON lines, .json, .parquet, the first three also compressed (.gz .zst
.bz2 .xz), folders of these, or a Hugging Face dataset into a folder that `pretrain` reads (Megatron's
.bin/.idx, the tokenizer, a manifest). A file's format is detected from its content; the files of a folder
that are left out are listed.

examples:
  mlm-train data prepare --input runs/corpus --output runs/data --tokenizer train:4096
  mlm-train data prepare --input books/ more.jsonl --output runs/data --tokenizer llama.model
  mlm-train data prepare --input wikitext:wikitext-2-raw-v1 --output runs/data --tokenizer tokenizer.json
"""

INSPECT_HELP = """Show what prepared data contain: counts, distinct ids per batch, decoded samples.

example:
  mlm-train data inspect runs/data --sequence-length 1024 --verify
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    names = "collect|synthetic|prepare|inspect"
    commands = parser.add_subparsers(dest="data_command", metavar=names, required=True)
    _add_collect(add_action(commands, "collect", "gather a text corpus from this machine", COLLECT_HELP))
    _add_synthetic(add_action(commands, "synthetic", "write synthetic tasks and their text", SYNTHETIC_HELP))
    _add_prepare(add_action(commands, "prepare", "tokenize text into a data folder", PREPARE_HELP))
    _add_inspect(add_action(commands, "inspect", "show what a data folder contains", INSPECT_HELP))


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand."""
    {
        "collect": _run_collect,
        "synthetic": _run_synthetic,
        "prepare": _run_prepare,
        "inspect": _run_inspect,
    }[args.data_command](args)
    return 0


def _add_collect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder to write")
    parser.add_argument(
        "--source",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of .py .md .rst .txt files (default: Python's standard library)",
    )
    parser.add_argument(
        "--max-bytes", type=size, default="40MB", metavar="SIZE", help="maximum text kept (default 40MB)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.02,
        metavar="F",
        help="fraction of documents held out (default 0.02)",
    )


def _add_synthetic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder to write")
    parser.add_argument("--seed", type=seed, default=0, help="all of it follows from this (default 0)")
    for name, default, text in (
        ("people", 40, "people with three facts each; every second one's facts are asked for"),
        ("repeats", 60, "statements of each fact"),
        ("documents", 2000, "documents of each other task, of twelve lines"),
        ("questions", 200, "at most this many questions of each task"),
    ):
        parser.add_argument(
            f"--{name}", type=int, metavar="N", default=default, help=f"{text} (default {default})"
        )


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH_OR_NAME",
        help="files, folders, or Hugging Face datasets as NAME or NAME:CONFIGURATION; a folder with "
        "train.jsonl and validation.jsonl (or .json, .parquet, compressed) keeps its own split",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder to write")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="TOKENIZER",
        help="a SentencePiece .model, a tokenizer.json, a folder with one, or train:VOCAB to train "
        "a SentencePiece BPE on the train split",
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="field that holds the text (default text)"
    )
    parser.add_argument(
        "--validation",
        metavar="PATH_OR_NAME",
        help="separate validation input; all of --input is then for training",
    )
    parser.add_argument(
        "--validation-fraction", type=float, metavar="F", help="fraction of documents held out (default 0.02)"
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="tokenizing processes (default: one per core); the output does not depend on it",
    )
    parser.add_argument(
        "--eod",
        metavar="TOKEN",
        help="token that ends a document, which no text may produce (default: the tokenizer's own, such "
        "as </s>)",
    )
    parser.add_argument(
        "--add-bos",
        action="store_true",
        help="begin each document with the tokenizer's begin-of-text token, such as <s>; models trained on "
        "these data get it before a prompt too",
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder written by prepare")
    parser.add_argument(
        "--sequence-length", type=_positive, default=512, metavar="S", help="tokens per sample (default 512)"
    )
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="samples to decode (default 2)")
    add_verify(parser, "the data (full: documents and ids too)", "sizes; --verify alone: full", bare="full")


def _run_collect(args: argparse.Namespace) -> None:
    from mlm_train.data.collect import collect

    report = collect(args.output, args.source, args.max_bytes, args.validation_fraction)
    extensions = ", ".join(
        f"{count['documents']} {suffix}"
        for suffix, count in report["extensions"].items()
        if count["documents"]
    )
    print(f"{args.output}: {report['documents']} documents, {report['bytes'] / 1e6:.1f} MB ({extensions})")
    for name, split in report["splits"].items():
        print(f"  {name}: {split['documents']} documents, {split['bytes'] / 1e6:.1f} MB")
    skipped = ", ".join(f"{count} {name}" for name, count in report["skipped"].items())
    print(
        f"  left out: {report['duplicates']} duplicates, {skipped}, "
        f"{report['beyond_max_bytes']} beyond --max-bytes"
    )


def _run_synthetic(args: argparse.Namespace) -> None:
    from mlm_train.data.synthetic import Sizes
    from mlm_train.data.synthetic_folder import PREFIX, write_synthetic

    sizes = Sizes(args.people, args.repeats, args.documents, args.questions)
    for task in write_synthetic(args.output, args.seed, sizes):
        documents, questions = len(task.documents), len(task.questions)
        print(f"{PREFIX}{task.name} ({task.kind}): {documents:,} documents, {questions:,} questions")


def _run_prepare(args: argparse.Namespace) -> None:
    from mlm_train.data.documents import LISTED
    from mlm_train.data.prepare import prepare
    from mlm_train.utils.cores import available_cores

    left_out: dict[str, str] = {}
    with _progress_bar() as progress:
        manifest = prepare(
            args.input,
            args.output,
            args.tokenizer,
            text_key=args.text_key,
            validation=args.validation,
            validation_fraction=args.validation_fraction,
            workers=args.workers or available_cores(),
            eod=args.eod,
            add_bos=args.add_bos,
            progress=progress,
            on_left_out=left_out.update,
        )
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.text_bytes:,} bytes of text"
        )
    print(f"{args.output}: vocab_size {manifest.vocab_size}, fingerprint {manifest.fingerprint[:16]}")
    if left_out:
        print(f"left out: {len(left_out)} {'file' if len(left_out) == 1 else 'files'}")
    for path, reason in [*left_out.items()][:LISTED]:
        print(f"  {escaped(f'{path}: {reason}')}")
    if len(left_out) > LISTED:
        print(f"  and {len(left_out) - LISTED} more")


def _run_inspect(args: argparse.Namespace) -> None:
    from rich.console import Console

    from mlm_train.data.inspection import inspect
    from mlm_train.data.prepared import PreparedData

    console = Console()
    with Console(stderr=True).status("checking files"):
        data = PreparedData.open(args.folder, args.verify or "sizes")
    if args.verify == "full":
        console.print(
            "every file matches the manifest's hash, every document ends with eod_id", style="green"
        )
    inspect(data, args.sequence_length, args.samples, console)


@contextmanager
def _progress_bar() -> "Iterator[Progress]":
    """One progress bar per stage on standard error, in bytes of input, with the remaining time."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def advance(stage: str, done: float, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.advance(tasks[stage], done)

        yield advance
        for task in bar.tasks:  # rounding: the documents' bytes may add up to slightly less than the total
            bar.update(task.id, completed=task.total)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)
