"""`python -m tests.gpu [--device cuda|cpu] [--json FILE] [NAME ...]`.

Exit code 0; 1 if a check failed; 2 if nothing was run.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str] | None = None) -> int:
    """Run the checks that are named, or all of them. words: instead of the command line's."""
    try:
        from tests.gpu.checks import CHECKS, Check
        from tests.gpu.runner import FAILED, Outcome, machine, run, summary, tree_of
    except ModuleNotFoundError as error:
        return refuse(f"{error.name} is not installed; the training path needs it: pip install {error.name}")
    args = parser().parse_args(words)
    if args.list:
        print("\n".join(f"{name:14}{check.about}" for name, check in CHECKS.items()))
        return 0
    for name in args.names:
        if name not in CHECKS and ":" not in name:
            return refuse(f"{name} is not a check; choose from {', '.join(CHECKS)}")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        return refuse(f"--json {args.json}: give a file in a folder that exists")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        return refuse("--device cuda: torch finds no CUDA device here; use --device cpu")
    found = machine(args.device)
    print("\n".join(f"{what}: {value}" for what, value in found.items()), flush=True)
    outcomes: list[Outcome] = []
    for name in args.names or CHECKS:
        outcomes.append(run(name, CHECKS.get(name) or Check(name, ""), args.device))
        print("\n".join(outcomes[-1].lines()), flush=True)
    print("\n".join(summary(outcomes)))
    if args.json is not None:
        text = json.dumps(tree_of(found, outcomes), indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return int(any(outcome.outcome == FAILED for outcome in outcomes))


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="tests.gpu", description="Checks of mlm_train on a machine with GPUs."
    )
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    found.add_argument("--json", metavar="FILE", help="write the report to a JSON file too")
    found.add_argument("--list", action="store_true", help="list the checks and do nothing")
    found.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="checks; default: all; or a function of yours: module:function",
    )
    return found


def refuse(reason: str) -> int:
    """Say in one line why nothing was run."""
    print(f"tests.gpu: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
