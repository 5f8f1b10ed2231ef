"""`mlm-train reproduce`: the paper's tables and figures at a chosen scale."""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.errors import UserError
from mlm_train.utils.arguments import refuse_below_one
from mlm_train.utils.cores import available_cores

if TYPE_CHECKING:
    from mlm_train.reproduce.plan import Plan
    from mlm_train.reproduce.steps import Step, Workspace

HELP = """The paper's tables and figures, measured at a chosen scale, beside the paper's numbers.

Trains what is missing (base, memory and flex models of several seeds, equal tokens), scores it, and writes
one JSON file per table or figure into OUTPUT/findings. Every step is one `mlm-train` command whose end is
noted: the same command goes on after a kill. The predicted time is shown first, and the remaining time before
each step.

  steps  list the commands with predicted times
  data   prepare the data alone
  train  run one training alone, the --number-th; with --show print its words instead, one per line
  page   write --page from the findings
On a cluster: data, then the trainings as a job array (slurm/reproduce.sbatch), then all.

examples:
  mlm-train reproduce table2 --scale micro --text texts/novels --output runs/reproduce
  mlm-train reproduce all --scale micro --text texts/novels --output runs/reproduce
  mlm-train reproduce steps --scale 1b --text texts/c4 --output /shared/reproduce
  mlm-train reproduce page --output docs --page docs/findings.md"""

SPECIAL = ("all", "steps", "data", "train", "page")
FIGURES = (
    "table1",
    "table2",
    "table5",
    "table6",
    "table7",
    "table8",
    "figure4",
    "figure5",
    "figure6",
    "figure7",
    "figure9",
    "figure10",
    "figure11",
    "figure12",
    "figure13",
)
MOST_JOBS = 8
SCALES = ("tiny", "micro", "250m", "750m", "1b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "items",
        nargs="+",
        choices=(*FIGURES, *SPECIAL),
        metavar="ITEM",
        help=f"{', '.join(SPECIAL)}, or some of {', '.join(FIGURES)}",
    )
    parser.add_argument("--scale", choices=SCALES, default="micro", help="how large (default %(default)s)")
    parser.add_argument(
        "--tokenizer",
        metavar="TOKENIZER",
        help="as `data prepare` takes it (default: one is trained on the text)",
    )
    parser.add_argument(
        "--text", metavar="PATH", help="texts to train on, as `data prepare --input` takes them"
    )
    parser.add_argument(
        "--validation-fraction", type=float, metavar="F", help="as `data prepare` takes it (default: its own)"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of all runs and results")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="steps at once (default: at tiny and micro one per core, up to 8; else 1)",
    )
    parser.add_argument("--number", type=int, metavar="N", help="train: which one, from 0")
    parser.add_argument("--show", action="store_true", help="train: print the words of the command")
    parser.add_argument("--page", metavar="FILE", help="page: the Markdown file to write")


def run(args: argparse.Namespace) -> int:
    """Run the steps and write the findings, or what else was asked for."""
    refuse_below_one(args, "jobs")
    special = [item for item in args.items if item in SPECIAL]
    if special and len(args.items) > 1:
        raise UserError(f"{special[0]} stands alone: leave the others out")
    if ("train" in special) != (args.number is not None):
        raise UserError("--number belongs to train: which training to run")
    if args.show and "train" not in special:
        raise UserError("--show belongs to train: which words to print")
    if ("page" in special) != (args.page is not None):
        raise UserError("--page belongs to page: the file to write")
    if args.page is not None:
        from mlm_train.reproduce.page import write_page

        findings = write_page(Path(args.output) / "findings", Path(args.page))
        print(f"{args.page}: {len(findings)} findings")
        return 0
    if args.text is None:
        raise UserError("--text is missing: name files or a folder of texts to train on")
    if not Path(args.text).exists():
        raise UserError(f"--text {args.text} does not exist: name files or a folder of texts")
    from mlm_train.reproduce.plan import SCALES as OF_SCALE
    from mlm_train.reproduce.plan import Plan

    tokenizer = args.tokenizer
    if tokenizer is not None and Path(tokenizer).exists():
        tokenizer = str(Path(tokenizer).absolute())  # the commands run in the folder of the results
    plan = Plan(OF_SCALE[args.scale], str(Path(args.text).absolute()), tokenizer, args.validation_fraction)
    if "steps" in special:
        return _list(plan.steps())
    if "data" in special or "train" in special:
        return _some(args, plan, "train." if "train" in special else None)
    return _measure(args, plan, list(FIGURES) if special else args.items)


def _list(steps: "list[Step]") -> int:
    from mlm_train.reproduce.steps import in_time

    for step in steps:
        print(f"{step.name:32s} {in_time(step.seconds):>10s}  mlm-train {shlex.join(step.words)}")
    print(f"{len(steps)} steps, about {in_time(sum(step.seconds for step in steps))}")
    return 0


def _some(args: argparse.Namespace, plan: "Plan", prefix: str | None) -> int:
    """Prepare the data, or run or show one of the steps with this prefix."""
    from mlm_train.reproduce.steps import needed, run_all

    steps = plan.steps()
    chosen = plan.data()
    if prefix is not None:
        found = [step for step in steps if step.name.startswith(prefix)]
        if not 0 <= args.number < len(found):
            raise UserError(f"--number {args.number}: give 0 to {len(found) - 1}")
        if args.show:
            print("\n".join(found[args.number].words[1:]))
            return 0
        chosen = needed(steps, [found[args.number].name])
    with _workspace(args) as workspace:
        run_all(workspace, chosen, lambda line: print(line, flush=True), _jobs(args))
    return 0


def _jobs(args: argparse.Namespace) -> int:
    """Steps at once: of small models as many as there are cores, up to MOST_JOBS."""
    small = args.scale in ("tiny", "micro")
    return int(args.jobs or (min(available_cores(), MOST_JOBS) if small else 1))


@contextmanager
def _workspace(args: argparse.Namespace) -> "Iterator[Workspace]":
    """The folder of all results, for one process at a time."""
    from mlm_train.reproduce.steps import Workspace
    from mlm_train.utils.files import locked, writing

    workspace = Workspace(Path(args.output), max(1, available_cores() // _jobs(args)))
    with writing(workspace.path):
        workspace.path.mkdir(parents=True, exist_ok=True)
    with locked(workspace.path, "being reproduced"):
        yield workspace


def _again(args: argparse.Namespace, name: str) -> str:
    """The command that measures one item alone."""
    options = ("scale", "text", "tokenizer", "validation_fraction", "output")
    given = {option: value for option in options if (value := getattr(args, option)) is not None}
    words = (word for field, value in given.items() for word in (f"--{field.replace('_', '-')}", f"{value}"))
    return shlex.join(["reproduce", name, *words])


def _measure(args: argparse.Namespace, plan: "Plan", names: list[str]) -> int:
    from mlm_train.reproduce.items import ITEMS, finding_of
    from mlm_train.reproduce.page import verdict
    from mlm_train.reproduce.scores import Scores
    from mlm_train.reproduce.steps import in_time, needed, run_all
    from mlm_train.utils.files import write_json

    every = plan.steps()
    wanted = {name: needed(every, ITEMS[name].needs(plan)) for name in names}
    steps = needed(every, [step.name for steps in wanted.values() for step in steps])
    with _workspace(args) as workspace:
        left = [step for step in steps if workspace.ended(step) is None]
        total = sum(step.seconds for step in left)
        jobs = _jobs(args)
        at_once = "" if jobs == 1 else f", {jobs} at once"
        print(
            f"{len(left)} of {len(steps)} steps to run{at_once}, predicted: {in_time(total / jobs)}",
            flush=True,
        )
        run_all(workspace, steps, lambda line: print(line, flush=True), jobs)
        took = sum(ended.seconds for step in steps if (ended := workspace.ended(step)) is not None)
        predicted = sum(step.seconds for step in steps)
        print(f"all steps took {in_time(took)} together; predicted: {in_time(predicted)}")
        scores = Scores(workspace, plan)
        for name in names:
            steps_of = [shlex.join(step.words) for step in wanted[name]]
            finding = finding_of(name, scores, _again(args, name), steps_of)
            file = workspace.path / "findings" / f"{name}.json"
            file.parent.mkdir(exist_ok=True)
            write_json(file, finding.model_dump(mode="json"))
            for claim in finding.claims:
                print(f"{name}: {claim.claim}: {verdict(claim)} ({claim.seen})")
    return 0
