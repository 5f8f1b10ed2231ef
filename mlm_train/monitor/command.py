"""`mlm-train monitor`: TensorBoard of a run, on the loopback interface."""

import argparse
import os
import sys
from pathlib import Path

from mlm_train.errors import UserError

HELP = """Show a run (or a folder of runs) in TensorBoard, reachable from this machine only.

example:
  mlm-train monitor runs/micro --port 6006"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", help="folder of a run, or a folder of several runs")
    parser.add_argument("--port", type=int, default=6006, help="port on 127.0.0.1 (default 6006)")


def run(args: argparse.Namespace) -> int:
    """Replace this process by TensorBoard, so that signals reach it directly."""
    if not Path(args.run).is_dir():
        raise UserError(f"{args.run} is not a folder: give the train.output of a run")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", args.run]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", str(args.port)])
