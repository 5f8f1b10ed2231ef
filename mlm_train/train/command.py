"""`mlm-train pretrain`: train a model from a config."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.config import Config, dump_config, load_config
from mlm_train.errors import SharedUserError, UserError

if TYPE_CHECKING:
    from mlm_train.data.prepared import PreparedData

HELP = """Train a model. One process by itself; every rank of a torchrun when started by it.
A run continues from the newest checkpoint in train.output by itself.

examples:
  mlm-train pretrain configs/micro.yaml
  mlm-train pretrain configs/micro.yaml train.steps=20 train.output=runs/short
  mlm-train pretrain configs/memory-1b.yaml --dry-run --world 64
  torchrun --nproc-per-node 2 -m mlm_train pretrain configs/micro.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_config_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print shapes, parameters and memory per rank, then end"
    )
    parser.add_argument("--world", type=int, help="with --dry-run: processes to plan for")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A config file and dotted overrides."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to it")


def run(args: argparse.Namespace) -> int:
    """Check everything, then train."""
    from mlm_train.parallel.runtime import world_size

    try:
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            return _dry_run(config, args.world or world_size())
        from mlm_train.train.setup import preflight

        data, checkpoint = preflight(config, world_size())
    except UserError as error:
        raise SharedUserError(str(error)) from error  # every rank finds the same
    return _train(config, data, checkpoint)


def _dry_run(config: Config, world: int) -> int:
    from rich.console import Console

    from mlm_train.parallel.topology import Topology
    from mlm_train.plan.report import print_plan

    topology = Topology.of(config.parallel, world)
    topology.check_batch(config)
    print(dump_config(config))
    print_plan(config, topology, Console())
    return 0


def _train(config: Config, data: "PreparedData", checkpoint: Path | None) -> int:
    from mlm_train.parallel import runtime as processes
    from mlm_train.train.loop import train
    from mlm_train.train.setup import build_run

    runtime = processes.start(config)
    if runtime.leads:
        print(dump_config(config), flush=True)
    run = build_run(config, runtime, data, checkpoint)
    try:
        train(run)
    finally:
        run.monitor.close()
    processes.stop()
    return 0
