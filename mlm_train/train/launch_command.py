"""`mlm-train launch`: pretrain on several processes of this machine, through torchrun's agent."""

import argparse

from mlm_train.config import load_config
from mlm_train.errors import UserError
from mlm_train.train.command import add_config_arguments

HELP = """Start pretrain on several processes of this machine (torchrun's agent, with sensible settings).
Everything is checked before the first process starts.

example:
  mlm-train launch --nproc 2 configs/micro.yaml train.steps=100"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--nproc", type=int, required=True, help="processes, one a GPU or CPU share")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check, then run the ranks; their exit code."""
    if args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}: give at least 1")
    from mlm_train.train.preflight import preflight

    preflight(load_config(args.config, args.overrides), args.nproc, args.nproc)
    from mlm_train.parallel.launch import launch_ranks

    debug = ["--debug"] if args.debug else []
    return launch_ranks(["pretrain", *debug, args.config, *args.overrides], args.nproc)
