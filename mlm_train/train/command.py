"""`mlm-train pretrain`: train a model from a config."""

import argparse

from mlm_train.config import Config, dump_config, load_config

HELP = """Train a model: as a single process, or as one rank when started by torchrun.
A run resumes from the newest checkpoint in train.output automatically. To continue after its last step, raise
train.steps, and set schedule.total_steps or schedule.rewarm_steps to choose the learning rate from there.

examples:
  mlm-train pretrain configs/micro.yaml
  mlm-train pretrain configs/micro.yaml train.steps=20 train.output=runs/short
  mlm-train pretrain configs/memory-70b.yaml --dry-run --world 512 --rank-memory 80
  torchrun --nproc-per-node 2 -m mlm_train pretrain configs/micro.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print shapes, parameters and memory per rank, then exit"
    )
    parser.add_argument("--world", type=int, help="with --dry-run: number of processes to plan for")
    parser.add_argument(
        "--rank-memory",
        type=float,
        metavar="GIB",
        help="with --dry-run: say whether this is enough for a rank",
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for a config file and dotted overrides."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="overrides of config fields"
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then train. Returns the exit code."""
    from mlm_train.train.signals import end_with_agent

    end_with_agent()  # before imports that take seconds
    from mlm_train.parallel.launch.environment import check_environment
    from mlm_train.parallel.runtime import local_world_size, world_size

    # Before the process group exists every rank reports bad input itself: the first exit may end the others.
    check_environment()
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        return _dry_run(config, args.world or world_size(), args.rank_memory)
    from mlm_train.train.loop import train
    from mlm_train.train.preflight import preflight
    from mlm_train.train.setup import opened_run
    from mlm_train.train.start_times import StartTimes

    times = StartTimes()
    times.done("imports")
    data = preflight(config, world_size(), local_world_size())
    times.done("checks")
    with opened_run(config, data, times) as run:
        if run is None:
            return 0
        if run.runtime.is_rank_0:
            print(dump_config(config), flush=True)
        return train(run)


def _dry_run(config: Config, world: int, rank_memory: float | None) -> int:
    from rich.console import Console

    from mlm_train.parallel.mesh.topology import Topology
    from mlm_train.plan.report import print_plan

    topology = Topology.of(config.parallel, world)
    topology.check_batch(config)
    print(dump_config(config))
    print_plan(config, topology, Console(), rank_memory)
    return 0
