"""`mlm-train bench checkpoint`: its options."""

import argparse
from typing import TYPE_CHECKING

from mlm_train.utils.arguments import add_action

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_HELP = """Compare blocking and background saves and loads of a checkpoint with plain files.

One process on CPU trains a base model of that size meanwhile; the measurements alternate. Then --ranks
data-parallel processes (ZeRO-1) save and load the same model: what each copies, writes, opens and reads.

examples:
  mlm-train bench checkpoint
  mlm-train bench checkpoint --gib 4 --folder /shared --json checkpoint.json"""


def add_checkpoint(actions: "Actions") -> None:
    """Add the action."""
    checkpoint = add_action(actions, "checkpoint", "compare checkpoints with plain files", _HELP)
    checkpoint.add_argument(
        "--gib", type=float, metavar="G", default=1.0, help="size of the checkpoint (default 1)"
    )
    checkpoint.add_argument(
        "--folder", metavar="DIR", default=".", help="folder on the disk to measure (default .)"
    )
    checkpoint.add_argument(
        "--runs", type=int, metavar="N", default=5, help="number of measurements (default 5)"
    )
    checkpoint.add_argument(
        "--ranks", type=int, metavar="N", default=8, help="data-parallel processes (default 8; 1: leave out)"
    )
    checkpoint.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    checkpoint.add_argument("--worker", help=argparse.SUPPRESS)  # for the ranks


def run_checkpoint(args: argparse.Namespace) -> int:
    """Measure, or be one of its ranks. Returns the exit code."""
    if args.worker is not None:
        from mlm_train.bench.checkpoint_ranks import work

        return work(args.worker)
    from mlm_train.bench.checkpoint import bench_checkpoint

    return bench_checkpoint(args)
