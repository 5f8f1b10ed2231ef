"""`mlm-train bench start` and `watch`: their options."""

import argparse
from typing import TYPE_CHECKING

from mlm_train.errors import UserError
from mlm_train.utils.arguments import add_action

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_START_HELP = """Time the start of a run on rank 0 of a world that is not there.

`pretrain`'s own start, up to its first step: imports, checks, process groups, model, weights, callbacks.
Collectives go to torch's fake process group, so waiting for other ranks takes no time.

examples:
  mlm-train bench start configs/memory-7b.yaml data.path=data/mine train.global_batch_size=4096 --world 4096
  mlm-train bench start configs/micro.yaml --world 8 --runs 5 --json start.json"""

_WATCH_HELP = """Count what watching for hangs asks of the job's store, in a world of threads.

Each rank's watchdog, as it runs in training, is a thread of one process; the store is a real one. The last
node is stopped, and nobody's main thread moves: after --timeout seconds all ranks find that at once.
Exit code 1 if any second has more than 5,000 operations. 4096 ranks need 13,300 open files.

examples:
  mlm-train bench watch --world 4096 --json watch.json
  mlm-train bench watch --world 64 --timeout 8"""


def _run_start(args: argparse.Namespace) -> int:
    from mlm_train.bench import start

    if args.worker:
        return start.work(args.worker)
    if args.config is None:
        raise UserError("bench start needs a config: a YAML file")
    return start.bench_start(args)


def _run_watch(args: argparse.Namespace) -> int:
    from mlm_train.bench import watch

    return watch.work(args.worker) if args.worker else watch.bench_watch(args)


STARTING = {"start": _run_start, "watch": _run_watch}


def add_starting(actions: "Actions") -> None:
    """Add the actions of STARTING."""
    start = add_action(actions, "start", "time a start on rank 0 of a large world", _START_HELP)
    start.add_argument("config", nargs="?", help="YAML file")
    start.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="overrides of config fields"
    )
    start.add_argument("--world", type=int, default=4096, metavar="N", help="ranks (default %(default)s)")
    start.add_argument("--runs", type=int, default=3, metavar="N", help="starts (default %(default)s)")
    watch = add_action(actions, "watch", "count what watching for hangs asks of the store", _WATCH_HELP)
    watch.add_argument("--world", type=int, default=4096, metavar="N", help="ranks (default %(default)s)")
    watch.add_argument(
        "--per-node", type=int, default=8, metavar="N", help="ranks of a node (default %(default)s)"
    )
    watch.add_argument(
        "--timeout",
        type=float,
        default=40.0,
        metavar="SECONDS",
        help="train.watchdog_timeout; from 40 on, heartbeats are 5 s apart, as usual (default 40)",
    )
    for action in (start, watch):
        action.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
        action.add_argument("--worker", help=argparse.SUPPRESS)  # for the process that is measured
