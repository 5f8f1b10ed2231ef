"""`mlm-train evaluate`: perplexity of a model, its scores on tasks, or its logits."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError
from mlm_train.evaluate.arguments import add_task_arguments
from mlm_train.inference.arguments import add_scale_arguments, language_model, scales
from mlm_train.tol.serve.arguments import add_tol_arguments, counted, store_options
from mlm_train.utils.arguments import MODEL_KINDS, add_edit_argument, refuse_below_one
from mlm_train.utils.checks import add_verify

if TYPE_CHECKING:
    from mlm_train.checkpoint.reading.logical_folder import ModelFolder
    from mlm_train.evaluate.scorer import Scorer
    from mlm_train.evaluate.windows import Windows

HELP = """Perplexity of a model by tokens, words and bytes, on prepared data or on raw text, or its scores on
tasks of lm-evaluation-harness, with FFN-M computed or read from a ToL; or its logits for given tokens.

examples:
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data --tol runs/micro-tol
  mlm-train evaluate --model runs/micro-export --data runs/quickstart/data --baselines runs/micro
  mlm-train evaluate --model runs/mixed --data runs/mixed/config.yaml --json
  mlm-train evaluate --model runs/micro-export --text books/ notes.jsonl --stride 128
  mlm-train evaluate --model runs/micro-export --tasks synthetic_facts --include-path synthetic/tasks
  mlm-train evaluate --model runs/micro-export --text books/ --memory-scale 0.5 --drop-layers 3,5-7
  mlm-train evaluate --model runs/micro-export --tokens ids.safetensors --dump-logits out.safetensors"""

CHUNK_WINDOWS = 4096  # windows counted at once
BATCH_SIZE = 8
SUBJECTS = ("data", "text", "tasks", "tokens")  # of which one is given
# Options that have an effect with these subjects alone.
OF_SUBJECTS = {
    "split": ("data", "text"),
    "sequence_length": ("data", "text", "tasks"),
    "samples": ("data",),
    "spread": ("data",),
    "baselines": ("data",),
    "stride": ("text",),
    "text_key": ("text",),
    "include_path": ("tasks",),
    "limit": ("tasks",),
    "num_fewshot": ("tasks",),
    "tensorboard": ("data", "text", "tasks"),
    "memory_scale": ("data", "text", "tasks"),
    "drop_layers": ("data", "text", "tasks"),
    "edit": ("data", "text", "tasks"),
    "add_bos": ("data", "text", "tasks"),
    "dump_logits": ("tokens",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", required=True, help=MODEL_KINDS)
    _add_subjects(parser)
    parser.add_argument(
        "--sequence-length", type=int, help="most tokens read at once; default: the model's maximum"
    )
    parser.add_argument(
        "--micro-batch-size",
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        help="windows or questions per forward pass (default %(default)s)",
    )
    add_tol_arguments(parser)
    add_scale_arguments(parser)
    add_edit_argument(parser)
    parser.add_argument(
        "--tensorboard",
        metavar="DIR",
        help="write the figures there, at the checkpoint's step; with --tol also what its counters count in "
        "each batch: rows, hits, bytes, waits",
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="put the begin-of-text token before texts, and before each window of data prepared without it "
        "(default: if the model was trained with it)",
    )
    add_verify(parser, "the model, --data and --tol", "full; sizes for --data and --tol")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_subjects(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="DIR",
        help="folders written by `data prepare`, or a run's config.yaml: each of its sources and validation "
        "sets",
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        help="of --data, and of a --text folder (default validation)",
    )
    parser.add_argument("--samples", type=int, help="number of windows of each folder; default: all")
    parser.add_argument(
        "--spread",
        action="store_true",
        help="--samples spread evenly over the split, as in a run's validation (default: the first)",
    )
    parser.add_argument(
        "--baselines",
        metavar="RUN",
        help="also unigram and bigram perplexity, counted on the tokens RUN trained on",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="raw text: files and folders that `data prepare` reads; each document is scored on its own",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="of --text: tokens that a window scores after the first one; fewer means more context for each, "
        "and more windows (default: the window's length)",
    )
    parser.add_argument("--text-key", metavar="KEY", help="field that holds the text (default text)")
    add_task_arguments(parser)
    parser.add_argument("--num-fewshot", type=int, metavar="K", help="solved examples before each question")
    parser.add_argument("--tokens", help="safetensors file with `tokens` int64 [batch, sequence]")
    parser.add_argument("--dump-logits", metavar="FILE", help="write their logits there")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    given = [name for name in SUBJECTS if getattr(args, name) is not None]
    if len(given) != 1 or bool(args.tokens) != bool(args.dump_logits):
        raise UserError("give one of --data, --text and --tasks, or --tokens with --dump-logits")
    for name, subjects in OF_SUBJECTS.items():
        if getattr(args, name) not in (None, False, []) and given[0] not in subjects:
            option, needed = name.replace("_", "-"), " or ".join(f"--{subject}" for subject in subjects)
            raise UserError(f"--{option} has no effect on --{given[0]}, only with {needed}; leave it out")
    refuse_below_one(args, "sequence_length", "samples", "micro_batch_size", "stride", "limit")
    {"data": _data, "text": _text, "tasks": _tasks, "tokens": _tokens}[given[0]](args)
    return 0


def _tokens(args: argparse.Namespace) -> None:
    from mlm_train.evaluate.logits import dump_logits

    dump_logits(Path(args.model), Path(args.tokens), Path(args.dump_logits), args.verify or "full")
    print(f"wrote {args.dump_logits}")


def _data(args: argparse.Namespace) -> None:
    from mlm_train.checkpoint.reading.edits import read_edits
    from mlm_train.checkpoint.reading.logical_folder import find_model
    from mlm_train.data.tokenizer import tokenizer_of
    from mlm_train.evaluate.prepared import named_folders
    from mlm_train.evaluate.report import figures
    from mlm_train.evaluate.score import Score
    from mlm_train.evaluate.scorer import Scorer
    from mlm_train.inference.decode import scales_of
    from mlm_train.tol.format.index_file import read_index
    from mlm_train.tol.serve.source import TolSource

    options = replace(store_options(args), verify=args.verify or "sizes")
    folder = find_model(args.model, args.verify or "full")
    named = named_folders(args.data, args.verify or "sizes")
    if args.baselines is not None and len(named) > 1:
        raise UserError("--baselines is counted on one folder's tokens: give one with --data")
    split = args.split or "validation"
    scorer = Scorer(
        folder,
        next(iter(named.values())),
        split,
        args.sequence_length,
        args.samples,
        args.micro_batch_size,
        with_memory=args.tol is None,
        add_bos=args.add_bos,
        embeds=args.tol is None or read_index(args.tol).embedding is None,
        scales=scales_of(folder.config, *scales(args)),
    )
    for edits in read_edits(args.edit, scorer.folder, args.tol):
        edits.apply(scorer.model)
    windows = {
        name: scorer.windows_of(split, args.samples, data, args.spread) for name, data in named.items()
    }
    source = (
        scorer.computed
        if args.tol is None
        else TolSource.of_model(args.tol, folder, options, patches=args.tol_patch)
    )
    scores = {}
    with counted(source, args.tensorboard) as after_batch:
        for name, part in windows.items():
            found = scorer.score(source, after_batch, part)
            text = part.text_size(tokenizer_of(named[name].path))
            scores[name] = Score(-found.loss * found.tokens, found.tokens, *text)
    result = figures(scores) | {"windows": sum(part.count for part in windows.values())}
    if args.baselines:
        result |= _baselines(args, scorer, next(iter(windows.values())))
    _show(args, folder, result)


def _text(args: argparse.Namespace) -> None:
    from mlm_train.evaluate.report import figures
    from mlm_train.evaluate.scorer import window_length
    from mlm_train.evaluate.texts import TextScorer, text_sources

    sources = text_sources(args.text, args.split or "validation", args.text_key or "text")
    lm = language_model(args)
    length = window_length(lm.folder.config, args.sequence_length)
    stride = length if args.stride is None else args.stride
    if stride > length:
        raise UserError(
            f"--stride {stride} would leave out tokens between windows of {length}: give at most that"
        )
    scorer = TextScorer(
        lm.decoder.model, lm.decoder.source, lm.tokenizer, lm.prefix_id, length, stride, args.micro_batch_size
    )
    with counted(lm.decoder.source, args.tensorboard) as after_batch:
        scores = scorer.score(sources, after_batch)
    _show(args, lm.folder, figures(scores))


def _tasks(args: argparse.Namespace) -> None:
    from mlm_train.evaluate.report import write_scalars
    from mlm_train.evaluate.tasks import load_tasks

    tasks = load_tasks(args.tasks.split(","), args.include_path)  # a name that is not there: before the model
    from mlm_train.evaluate.harness import MemoryLM

    lm = language_model(args)
    model = MemoryLM(lm, batch_size=args.micro_batch_size, max_length=args.sequence_length)
    with counted(lm.decoder.source, args.tensorboard) as after_batch:
        model.after_batch = after_batch
        results = tasks.run(model, args.limit, args.num_fewshot)
    if args.tensorboard is not None:
        write_scalars(results.scalars(), args.tensorboard, _step(lm.folder))
    print(results.as_json() if args.json else results.table())


def _show(args: argparse.Namespace, folder: "ModelFolder", result: dict[str, Any]) -> None:
    from mlm_train.evaluate.report import print_figures, write_events

    if args.tensorboard is not None:
        write_events(result, args.tensorboard, _step(folder))
    print_figures(result, args.json)


def _step(folder: "ModelFolder") -> int:
    """The training step of a checkpoint; 0 for an export, which does not record it."""
    return 0 if folder.manifest is None else folder.manifest.progress.step


def _baselines(args: argparse.Namespace, scorer: "Scorer", windows: "Windows") -> dict[str, float]:
    """Unigram and bigram perplexity, counted on exactly the tokens that a run was trained on."""
    from mlm_train.checkpoint.folders import resolve
    from mlm_train.checkpoint.load import config_of, open_checkpoint
    from mlm_train.data.samples import Samples
    from mlm_train.evaluate.baselines import BigramCounts

    data = scorer.data
    manifest = open_checkpoint(resolve(Path(args.baselines)), "sizes")
    if manifest.data.fingerprint != data.fingerprint:
        raise UserError(f"--baselines {args.baselines} was not trained on {data.path} (fingerprints differ)")
    config = config_of(manifest)
    trained = Samples(data.split("train"), config.data.sequence_length, config.train.seed)
    counts = BigramCounts(data.vocab_size)
    seen = manifest.progress.samples
    for start in range(0, seen, CHUNK_WINDOWS):
        counts.add(trained.windows(range(start, min(seen, start + CHUNK_WINDOWS))))
    baselines = counts.perplexities(windows.tokens(range(windows.count)).numpy())
    return {"unigram": baselines.unigram, "bigram": baselines.bigram}
