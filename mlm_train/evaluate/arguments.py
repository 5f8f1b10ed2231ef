"""Options of commands that score a model on the windows of one prepared folder."""

import argparse
from typing import TYPE_CHECKING

from mlm_train.utils.arguments import MODEL_KINDS

if TYPE_CHECKING:
    from mlm_train.evaluate.scorer import Scorer

WINDOWS = ("samples", "sequence_length", "micro_batch_size")  # of which each is at least 1


def add_scored_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --data, and how much of its validation split is scored; --verify is the command's own."""
    parser.add_argument("--model", required=True, help=MODEL_KINDS)
    parser.add_argument("--data", required=True, help="folder written by `data prepare`")
    parser.add_argument("--samples", type=int, help="number of windows, from the first; default: all")
    parser.add_argument("--sequence-length", type=int, help="tokens per window; default: the model's maximum")
    parser.add_argument(
        "--micro-batch-size", type=int, default=8, help="windows per forward pass (default 8)"
    )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `tasks.load_tasks` and `Tasks.run` take."""
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="tasks of lm-evaluation-harness, or YAML files of some, with commas (extra lm-eval)",
    )
    parser.add_argument("--include-path", metavar="DIR", help="folder with the YAML of tasks of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="first N questions of each task; default: all")


def scorer_of(args: argparse.Namespace, with_memory: bool = False) -> "Scorer":
    """The Scorer of these options. UserError, as it raises it."""
    from mlm_train.evaluate.scorer import Scorer

    return Scorer(
        args.model,
        args.data,
        length=args.sequence_length,
        count=args.samples,
        micro_batch=args.micro_batch_size,
        with_memory=with_memory,
        verify=args.verify,
    )
