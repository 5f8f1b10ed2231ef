"""`mlm-train analyze`: what a model's feed-forward memory does."""

import argparse

from mlm_train.analyze.ablate.command import add_ablate, run_ablate
from mlm_train.analyze.prune.command import add_prune, run_prune

HELP = """What a model's feed-forward memory does, and what the model loses without it.

examples:
  mlm-train analyze ablate --model runs/micro --data data/mine --study alpha drop --output ablation.json
  mlm-train analyze prune --model runs/base --data data/mine --method wanda --like memory"""

_RUN = {"ablate": run_ablate, "prune": run_prune}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_ablate(actions)
    add_prune(actions)


def run(args: argparse.Namespace) -> int:
    """Run the action."""
    return _RUN[args.action](args)
