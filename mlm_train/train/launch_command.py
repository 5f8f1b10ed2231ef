"""`mlm-train launch`: pretrain on several processes of one or more machines, or as a Slurm job."""

import argparse

from mlm_train.config import Config, load_config
from mlm_train.errors import UserError
from mlm_train.train.command import add_config_arguments

HELP = """Start pretrain on several processes (torchrun's agent, with sensible settings).
Everything is checked before the first process starts. With --slurm a job is submitted instead; it
saves a checkpoint before its time limit and requeues itself (docs/slurm.md).

examples:
  mlm-train launch --nproc 2 configs/micro.yaml train.steps=100
  mlm-train launch --slurm configs/paper/memory-1b.yaml --nodes 4 --gpus-per-node 8 --time 04:00:00
  mlm-train launch --slurm configs/paper/memory-1b.yaml --nodes 4 --gpus-per-node 8 --render
  mlm-train launch --nproc 8 --nodes 4 --rendezvous node1:29500 CONFIG    (the same on all four)
  mlm-train launch --nproc 8 --nodes 2:4 --max-restarts 10 --rendezvous node1:29500 CONFIG
                                              (runs on as many of the four as are available)
  mlm-train launch --slurm configs/paper/memory-1b.yaml --nodes 4 --spares 1 --gpus-per-node 8
                                              (a fifth node waits, and replaces a lost one)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--nproc", type=int, help="processes per machine (on GPUs: one per GPU)")
    parser.add_argument(
        "--nodes", type=_counts, default=(1, 1), metavar="N|MIN:MAX", help="number of machines (default 1)"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="R",
        help="restart all ranks from the newest checkpoint when one fails or hangs, at most R times "
        "(default 0, with MIN:MAX 3; in a Slurm job as many as nodes may be lost)",
    )
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="with several machines: one of them and a free port of it"
    )
    add_config_arguments(parser)
    slurm = parser.add_argument_group("as a Slurm job")
    slurm.add_argument("--slurm", action="store_true", help="submit slurm/pretrain.sbatch")
    slurm.add_argument(
        "--spares",
        type=int,
        default=0,
        metavar="S",
        help="nodes beside those of --nodes, which wait and replace lost ones without a requeue (default 0)",
    )
    slurm.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs per node, each with one process")
    slurm.add_argument("--partition", help="default: SBATCH_PARTITION, or the cluster's")
    slurm.add_argument("--account", help="default: SBATCH_ACCOUNT, or your own")
    slurm.add_argument("--time", help="time limit, such as 04:00:00; default: the partition's")
    slurm.add_argument("--render", action="store_true", help="print the sbatch command and submit nothing")


def run(args: argparse.Namespace) -> int:
    """Check everything, then run the ranks or submit the job. Returns their exit code."""
    _check_counts(args)
    from mlm_train.train.preflight import preflight

    processes = args.nproc or args.gpus_per_node
    config = load_config(args.config, args.overrides)
    fewest, most = args.nodes
    fitting = _fitting(config, fewest, most, processes)
    preflight(config, most * processes, None if args.slurm else processes)
    if args.slurm:
        from mlm_train.train.slurm import SlurmJob, submit

        job = SlurmJob(
            config=args.config,
            overrides=tuple(args.overrides),
            nodes=(fewest, most),
            spares=args.spares,
            restarts=args.max_restarts,
            processes=processes,
            gpus=args.gpus_per_node,
            partition=args.partition,
            account=args.account,
            time=args.time,
        )
        return submit(job, args.render)
    from mlm_train.parallel.launch.launcher import Nodes, launch_ranks

    debug = ["--debug"] if args.debug else []
    arguments = ["pretrain", *debug, args.config, *args.overrides]
    restarts = args.max_restarts
    if restarts is None:
        restarts = 3 if fewest < most else 0
    return launch_ranks(arguments, args.nproc, Nodes(fitting, args.rendezvous), restarts)


def _fitting(config: Config, fewest: int, most: int, processes: int) -> tuple[int, ...]:
    """The numbers of nodes from `fewest` to `most` on which layout and batch fit.

    Raises UserError where `fewest` or `most` is none of them, and names those that are.
    """
    from mlm_train.parallel.mesh.topology import Topology

    faults: dict[int, UserError] = {}
    for nodes in range(fewest, most + 1):
        try:
            Topology.of(config.parallel, nodes * processes).check_batch(config)
        except UserError as error:
            faults[nodes] = error
    fitting = tuple(nodes for nodes in range(fewest, most + 1) if nodes not in faults)
    for nodes in (fewest, most):
        if nodes in faults and fewest == most:
            raise faults[nodes]
        if nodes in faults:
            fits = f"from {fewest} to {most} these fit: {', '.join(map(str, fitting)) or 'none'}"
            raise UserError(f"--nodes {fewest}:{most}: not with {nodes} ({faults[nodes]}); {fits}")
    return fitting


def _counts(text: str) -> tuple[int, int]:
    """Parse `N` or `MIN:MAX`."""
    fewest, _, most = text.partition(":")
    return int(fewest), int(most or fewest)


def _check_counts(args: argparse.Namespace) -> None:
    """Raise UserError for options out of range or in conflict."""
    fewest, most = args.nodes
    for name, value in (("nproc", args.nproc), ("nodes", fewest), ("gpus-per-node", args.gpus_per_node)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give at least 1")
    if most < fewest:
        raise UserError(f"--nodes {fewest}:{most}: the second number must be the larger one")
    if args.max_restarts is not None and args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts}: give 0 or more")
    if args.spares < 0:
        raise UserError(f"--spares {args.spares}: give 0 or more")
    if args.slurm:
        if (args.nproc is None) == (args.gpus_per_node is None):
            raise UserError("--slurm needs --gpus-per-node, or --nproc for processes on CPUs")
        if args.rendezvous is not None:
            raise UserError("--rendezvous: a Slurm job chooses its own; leave it out")
        return
    if args.nproc is None:
        raise UserError("--nproc is missing: give the number of processes on this machine")
    if most > 1 and args.rendezvous is None:
        raise UserError("--nodes and --rendezvous HOST:PORT go together: give both for several machines")
    for name in ("spares", "gpus_per_node", "partition", "account", "time", "render"):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} has an effect only with --slurm")
