"""`mlm-train bench`: measure this machine."""

import argparse

from mlm_train.arguments import add_action
from mlm_train.errors import UserError

HELP = """Measure this machine: alternated runs, medians.

example:
  mlm-train bench x0 --stages 2 4 --json x0.json"""

_X0_HELP = """Count and time the three ways in which x0 reaches the stages of a pipeline.

For each number of stages that many gloo processes train a small memory model: real steps, forward and
backward, no optimizer. What x0 moves is counted where tensors are handed to torch.distributed, as
what a step moves less what the same step of a model without FFN-M moves, and compared with the formula.
Exit code 1 if they differ, or if the transports' losses do. Timings are of this machine: processes
that share cores or memory make them noisy.

examples:
  mlm-train bench x0
  mlm-train bench x0 --stages 2 4 --runs 15 --data runs/quickstart/data --json x0.json
  mlm-train bench x0 --stages 2 --schedule interleaved_1f1b"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `x0`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    x0 = add_action(actions, "x0", "the transports of x0 between pipeline stages", _X0_HELP)
    x0.add_argument(
        "--stages", type=int, nargs="+", metavar="S", default=[2, 4], help="pipeline ranks (default: 2 4)"
    )
    x0.add_argument(
        "--runs", type=int, metavar="N", default=9, help="timed steps of each transport (default 9)"
    )
    x0.add_argument("--schedule", choices=("gpipe", "1f1b", "interleaved_1f1b"), default="1f1b")
    x0.add_argument(
        "--data", metavar="DIR", help="folder of `data prepare`; default: ids drawn from a Zipf distribution"
    )
    x0.add_argument("--json", metavar="FILE", help="write the figures there")
    x0.add_argument("--worker", help=argparse.SUPPRESS)  # what the ranks themselves are started with


def run(args: argparse.Namespace) -> int:
    """0; 1 if a count differs from its formula."""
    if args.worker:
        from mlm_train.bench.x0_ranks import work

        return work(args.worker)
    if args.runs < 1:
        raise UserError(f"--runs {args.runs}: give at least 1")
    from mlm_train.bench.x0 import bench_x0

    return bench_x0(args.stages, args.runs, args.schedule, args.data, args.json)
