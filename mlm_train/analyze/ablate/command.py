"""`mlm-train analyze ablate`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError
from mlm_train.evaluate.arguments import WINDOWS, add_scored_arguments, add_task_arguments, scorer_of
from mlm_train.utils.arguments import add_action, refuse_below_one
from mlm_train.utils.checks import add_verify

if TYPE_CHECKING:
    from mlm_train.analyze.ablate.compressed import Compressed
    from mlm_train.analyze.ablate.points import Point
    from mlm_train.analyze.ablate.study import Ablation, Score
    from mlm_train.evaluate.scorer import Scorer
    from mlm_train.evaluate.tasks import Tasks
    from mlm_train.utils.arguments import Actions

_HELP = """Scale, drop or compress a model's feed-forward memory, and score each change.

Perplexity of the validation split of --data. --study, one or more of:
  alpha        the output of all FFN-M scaled (of a base model: of its FFN)
  layer-alpha  that of one layer scaled
  drop         that of one layer dropped; of a flex model FFN-C too
  precision    FFN-M from a table in 16, 8 and 4 bits (needs --tol)
  rank         FFN-M from a table of lower rank (needs --tol): uniform, weighted by token frequency in --data,
               and a rank per layer with the same sum
With --tasks, also tasks of lm-evaluation-harness, such as those of `data synthetic`.
The file is written after each change; the same command goes on after the last one.

examples:
  mlm-train analyze ablate --model runs/micro --data data/mine --study alpha drop --output alpha.json
  mlm-train analyze ablate --model runs/base --data data/c4 --study layer-alpha --alphas 0,0.5 --output b.json
  mlm-train analyze ablate --model runs/micro --data data/mine --tol tol/micro --study rank --output r.json
  mlm-train analyze ablate --model runs/micro --data data/mine --study alpha --tasks synthetic_facts \\
      --include-path synthetic --output tasks.json"""

STUDIES = ("alpha", "layer-alpha", "drop", "precision", "rank")
NEED_TABLE = ("precision", "rank")
ALPHAS = (0.0, 0.25, 0.5, 0.8, 1.2)
CUTS = (0.1, 0.2, 0.3, 0.4, 0.5)  # the paper's


def add_ablate(actions: "Actions") -> None:
    """Add the action."""
    ablate = add_action(actions, "ablate", "scale, drop or compress FFN-M, and score it", _HELP)
    add_scored_arguments(ablate)
    ablate.add_argument("--output", required=True, metavar="FILE", help="JSON file of the scores")
    ablate.add_argument("--study", required=True, nargs="+", choices=STUDIES, help="what is changed")
    ablate.add_argument(
        "--alphas", type=_numbers, default=ALPHAS, metavar="A,B", help="factors (default 0,0.25,0.5,0.8,1.2)"
    )
    ablate.add_argument("--tol", metavar="DIR", help="the model's table in a plain type, from `tol build`")
    ablate.add_argument(
        "--cuts", type=_numbers, default=CUTS, metavar="A,B", help="shares of the ranks (default 0.1 to 0.5)"
    )
    add_task_arguments(ablate)
    ablate.add_argument("--plot", metavar="FILE", help="a PNG of the perplexities")
    add_verify(ablate, "the model, --data and --tol", "full; sizes for --data and --tol")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(math.isfinite(number) and number >= 0 for number in found):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: give numbers from 0 on, such as 0,0.5")
    return found


def run_ablate(args: argparse.Namespace) -> int:
    """Score, write and show."""
    refuse_below_one(args, *WINDOWS, "limit")
    if args.tasks is None and (args.include_path is not None or args.limit is not None):
        raise UserError("--include-path and --limit have no effect without --tasks: add it")
    if any(cut >= 1 for cut in args.cuts):
        raise UserError(f"--cuts {max(args.cuts):g}: give shares below 1")
    tables = [study for study in args.study if study in NEED_TABLE]
    if tables and args.tol is None:
        raise UserError(
            f"--study {tables[0]} needs the model's table: give --tol DIR (`mlm-train tol build`)"
        )
    if args.tol is not None and not tables:
        raise UserError("--tol has no effect on these studies: leave it out, or add precision or rank")
    from mlm_train.analyze.ablate.points import points_of
    from mlm_train.analyze.ablate.study import begun, is_ablation, run
    from mlm_train.utils.files import check_output, is_png
    from mlm_train.utils.progress import tracked

    file = check_output("--output", args.output, is_ablation, "file of `analyze ablate`")
    plot = None if args.plot is None else check_output("--plot", args.plot, is_png, "PNG")
    tasks = None if args.tasks is None else _tasks(args)
    scorer = scorer_of(args, with_memory=True)
    points = points_of(scorer.config, args.study, args.alphas, args.cuts)
    ablation = begun(file, _about(args, scorer))
    compressed = None if args.tol is None else _compressed(args, scorer)
    ablation = run(
        file, ablation, tracked(points, "ablation"), scorer, compressed, _score_of(scorer, tasks, args.limit)
    )
    _show(ablation, points)
    if plot is not None:
        from mlm_train.analyze.ablate.plot import plot_ablation

        plot_ablation(plot, ablation)
    return 0


def _about(args: argparse.Namespace, scorer: "Scorer") -> "Ablation":
    from mlm_train.analyze.ablate.study import Ablation
    from mlm_train.tol.format.index import INDEX
    from mlm_train.utils.files import sha256_of

    return Ablation(
        model=scorer.fingerprint,
        kind=scorer.config.kind,
        data=scorer.data.fingerprint,
        table=None if args.tol is None else sha256_of(Path(args.tol) / INDEX),
        windows=scorer.windows.count,
        length=scorer.windows.samples.sequence_length,
        tasks=() if args.tasks is None else args.tasks.split(","),
        limit=args.limit,
        rows=[],
    )


def _compressed(args: argparse.Namespace, scorer: "Scorer") -> "Compressed":
    from mlm_train.analyze.ablate.compressed import Compressed
    from mlm_train.tol.format.index import check_fits
    from mlm_train.tol.serve.frequency import counts_of
    from mlm_train.tol.serve.reader import TableReader

    table = TableReader.open_plain(args.tol, args.verify or "sizes")
    check_fits(Path(args.tol), table.index, scorer.config)
    if table.index.source.checkpoint != scorer.fingerprint:
        raise UserError(f"{args.tol} was built from another model than {args.model}: give this one's table")
    return Compressed(table, counts_of(scorer.data))


def _tasks(args: argparse.Namespace) -> "Tasks":
    from mlm_train.evaluate.tasks import load_tasks

    return load_tasks(args.tasks.split(","), args.include_path)


def _score_of(scorer: "Scorer", tasks: "Tasks | None", limit: int | None) -> "Score":
    from mlm_train.evaluate.perplexity import measure_perplexity

    tokenizer = None if tasks is None else scorer.folder.tokenizer()

    def score(model: Any, source: Any) -> dict[str, float]:
        found = measure_perplexity(model, source, scorer.windows.batches())
        scores = {"loss": found.loss, "perplexity": found.perplexity}
        if tasks is None:
            return scores
        from mlm_train.evaluate.harness import MemoryLM
        from mlm_train.inference.language_model import with_model

        lm = with_model(scorer.folder, model, source, tokenizer)
        return scores | _without_errors(tasks.run(MemoryLM(lm), limit).scalars())

    return score


def _without_errors(scalars: dict[str, float]) -> dict[str, float]:
    """Without standard errors, and what the harness could not compute."""
    return {name: value for name, value in scalars.items() if "_stderr" not in name and math.isfinite(value)}


def _show(ablation: "Ablation", points: "Sequence[Point]") -> None:
    rows = {row.point: row for row in ablation.rows}
    exact = rows[points[0]].scores["loss"]
    for point in points:
        row = rows[point]
        loss, size = row.scores["loss"], "" if row.bytes is None else f"  {row.bytes / 1e6:,.2f} MB"
        of_tasks = "".join(
            f"  {name.removeprefix('tasks/')} {value:.3f}"
            for name, value in row.scores.items()
            if name.startswith("tasks/")
        )
        print(
            f"{point.name:44s} perplexity {row.scores['perplexity']:12,.4f}  loss {loss - exact:+.4f}{size}"
            f"{of_tasks}"
        )
