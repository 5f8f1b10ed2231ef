"""`mlm-train analyze`: what a model's feed-forward memory does."""

import argparse

from mlm_train.analyze.ablate.command import add_ablate, run_ablate
from mlm_train.analyze.edit_command import add_edits, run_edit, run_edits, run_effect
from mlm_train.analyze.keys.command import add_keys, run_keys
from mlm_train.analyze.keys.projector_command import add_projector, run_projector
from mlm_train.analyze.keys.query_command import add_queries, run_key, run_similar, run_token
from mlm_train.analyze.prune.command import add_prune, run_prune
from mlm_train.analyze.report.command import add_report, run_report
from mlm_train.analyze.shares_command import add_shares, run_shares

HELP = """What a model's feed-forward memory does, and what the model loses without it.

examples:
  mlm-train analyze keys --model exports/run1 --output keys/run1
  mlm-train analyze token keys/run1 " Paris"
  mlm-train analyze edit exports/run1 --silence 3:17 --output edits.json
  mlm-train analyze effect --model exports/run1 --edit edits.json --data data/mine
  mlm-train analyze shares --model exports/run1 --data data/mine
  mlm-train analyze ablate --model exports/run1 --data data/mine --study alpha drop --output ablation.json
  mlm-train analyze prune --model runs/base --data data/mine --method wanda --like memory
  mlm-train analyze report --keys keys/run1 --ablation ablation.json --output report.html"""

_RUN = {
    "keys": run_keys,
    "token": run_token,
    "key": run_key,
    "similar": run_similar,
    "projector": run_projector,
    "edit": run_edit,
    "edits": run_edits,
    "effect": run_effect,
    "shares": run_shares,
    "ablate": run_ablate,
    "prune": run_prune,
    "report": run_report,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_keys(actions)
    add_queries(actions)
    add_projector(actions)
    add_edits(actions)
    add_shares(actions)
    add_ablate(actions)
    add_prune(actions)
    add_report(actions)


def run(args: argparse.Namespace) -> int:
    """Run the action."""
    return _RUN[args.action](args)
