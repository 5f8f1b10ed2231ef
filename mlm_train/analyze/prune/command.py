"""`mlm-train analyze prune`."""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError
from mlm_train.evaluate.arguments import WINDOWS, add_scored_arguments, scorer_of
from mlm_train.utils.arguments import add_action, refuse_below_one, seed
from mlm_train.utils.checks import add_verify
from mlm_train.utils.files import refuse_used

if TYPE_CHECKING:
    from torch import Tensor

    from mlm_train.analyze.prune.model import PrunedMatrix
    from mlm_train.evaluate.scorer import Scorer
    from mlm_train.utils.arguments import Actions

_HELP = """Prune a base model to the active size of MemoryLLM or Flex-MemoryLLM, and score it.

Magnitude, Wanda or SparseGPT zero the same share of every matrix of the layers (embedding, norms and head
stay), with training windows of --data as calibration text. Perplexity is that of its validation split, before
and after. With --output the pruned model is written as an export.

examples:
  mlm-train analyze prune --model runs/base --data data/c4 --method wanda --like memory
  mlm-train analyze prune --model runs/base --data data/c4 --method sparsegpt --like flex2 --output pruned
  mlm-train analyze prune --model runs/base --data data/c4 --method magnitude --sparsity 0.5 --json"""

METHODS = ("magnitude", "wanda", "sparsegpt")
LIKE = {"memory": 0.0, "flex1": 1.0, "flex2": 2.0, "flex3": 3.0}  # beta of the kind to be as small as
BATCH = 8  # calibration windows per forward pass


def add_prune(actions: "Actions") -> None:
    """Add the action."""
    prune = add_action(actions, "prune", "prune a base model, and score it", _HELP)
    add_scored_arguments(prune)
    prune.add_argument("--method", required=True, choices=METHODS)
    target = prune.add_mutually_exclusive_group(required=True)
    target.add_argument("--like", choices=LIKE, help="kind whose number of active parameters is kept")
    target.add_argument("--sparsity", type=float, metavar="S", help="share of zeros, between 0 and 1")
    prune.add_argument(
        "--calibration", type=int, default=128, metavar="N", help="windows of training text (default 128)"
    )
    prune.add_argument("--seed", type=seed, default=0, help="which windows (default 0)")
    prune.add_argument("--output", metavar="FOLDER", help="new folder for the pruned model")
    prune.add_argument("--json", action="store_true", help="print JSON")
    add_verify(prune, "the model and --data", "full; sizes for --data")


def run_prune(args: argparse.Namespace) -> int:
    """Prune, score, print, and write the export."""
    refuse_below_one(args, "calibration", *WINDOWS)
    if args.sparsity is not None and not 0 < args.sparsity < 1:
        raise UserError(f"--sparsity {args.sparsity}: give a number between 0 and 1")
    if args.output is not None:
        refuse_used(Path(args.output))
    import torch

    from mlm_train.analyze.prune.model import sparsity_like
    from mlm_train.checkpoint.export_folder import write_export

    scorer = scorer_of(args)
    if scorer.config.kind != "base":
        raise UserError(f"{args.model} is a {scorer.config.kind} model: give a base model to prune")
    sparsity = args.sparsity if args.like is None else sparsity_like(scorer.config, LIKE[args.like])
    before = scorer.score(None).perplexity
    matrices = _prune(scorer, args, sparsity)
    after = scorer.score(None).perplexity
    result = {
        "method": args.method,
        "sparsity": sparsity,
        "zeros": sum(matrix.zeros for matrix in matrices) / sum(matrix.elements for matrix in matrices),
        "perplexity": before,
        "pruned_perplexity": after,
        "output_error": {f"layers.{matrix.layer}.{matrix.name}": matrix.error for matrix in matrices},
    }
    _show(result, matrices, args.json)
    if args.output is not None:
        write_export(Path(args.output), scorer.folder, scorer.model, torch.float32)
        if not args.json:
            print(f"wrote {args.output}")
    return 0


def _prune(scorer: "Scorer", args: argparse.Namespace, sparsity: float) -> "list[PrunedMatrix]":
    from rich.console import Console
    from rich.progress import Progress

    from mlm_train.analyze.prune.model import prune

    batches = calibration(scorer, args.calibration, args.seed)
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(args.method, total=scorer.config.num_hidden_layers)
        return prune(scorer.model, batches, args.method, sparsity, lambda: bar.advance(task))


def calibration(scorer: "Scorer", count: int, order: int) -> "list[Tensor]":
    """Some windows of the training split, a seeded choice: int64 [at most BATCH, sequence] each."""
    import torch

    windows = scorer.windows_of("train")
    chosen = torch.randperm(windows.count, generator=torch.Generator().manual_seed(order))[:count].tolist()
    return [windows.tokens(chosen[i : i + BATCH])[:, :-1] for i in range(0, len(chosen), BATCH)]


def _show(result: dict[str, Any], matrices: "Sequence[PrunedMatrix]", as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    print(f"{result['method']}: {result['zeros']:.2%} of the layers' matrices are zero")
    for layer in sorted({matrix.layer for matrix in matrices}):
        errors = [matrix.error for matrix in matrices if matrix.layer == layer]
        print(f"layer {layer}: relative output error {statistics.mean(errors):.4f}, most {max(errors):.4f}")
    print(f"perplexity {result['perplexity']:,.4f}, pruned {result['pruned_perplexity']:,.4f}")
