"""Choose the mode of memory.mode=auto at the start of a run, from its data, layout and hardware."""

from dataclasses import replace

import psutil
import torch

from mlm_train.checkpoint.load import config_of
from mlm_train.config import Config
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.runtime import Runtime, local_world_size
from mlm_train.plan.ffn_m import Distinct, choose, table_bytes, with_memory
from mlm_train.plan.memory import rank_memory
from mlm_train.plan.speeds import measure_speeds
from mlm_train.train.batches import step_batches
from mlm_train.train.preflight import Resumed

USED_SHARE = 0.8  # of a rank's free memory that a run may take: fragments and buffers are not planned


def decide_mode(
    config: Config, runtime: Runtime, samples: Samples, resumed: Resumed | None
) -> tuple[Config, str]:
    """The config with a definite memory.mode, and a log line with the reason. Every rank calls it.

    A run resumed in the same layout keeps the checkpoint's choice, so that its numbers stay bitwise equal.
    """
    if config.memory is None:
        return config, ""
    if config.memory.mode != "auto":
        return config, _described(config, runtime, samples)
    if resumed is not None and (kept := _kept(config, config_of(resumed.manifest))):
        return kept, f"memory.mode=auto keeps the checkpoint's {kept.memory.mode if kept.memory else ''}"
    speeds = measure_speeds(config, runtime)
    budget = min(runtime.gather(lambda: _budget(config, runtime)))
    # Rank 0's samples decide for all ranks: they must agree.
    distinct = runtime.broadcast(lambda: expected_distinct(config, runtime.topology, samples))
    choice = choose(config, runtime.topology, distinct, speeds, budget)
    return choice.config, choice.reason


def expected_distinct(config: Config, topology: Topology, samples: Samples) -> Distinct:
    """Distinct ids of the first step: per micro-batch, per data-parallel rank, and over all ranks."""
    size, micro_batch = config.train.global_batch_size, config.train.micro_batch_size
    alone = replace(topology, rank=0, world=topology.tensor * topology.pipeline)
    whole = step_batches(samples, 0, size, micro_batch, alone)
    return Distinct.of([batch.ids for batch in whole], topology.data)


def _described(config: Config, runtime: Runtime, samples: Samples) -> str:
    """A log line with the given mode, and the size of its tables."""
    assert config.memory is not None
    if config.memory.mode != "table":
        return f"memory.mode={config.memory.mode}"
    distinct = runtime.broadcast(lambda: expected_distinct(config, runtime.topology, samples))
    size = table_bytes(config, runtime.topology, distinct) / 2**20
    ids = f"about {distinct.step:,.0f} distinct ids per step"
    return f"memory.mode=table: {ids}, tables {size:,.0f} MiB per rank"


def _kept(config: Config, old: Config) -> Config | None:
    """The config with the checkpoint's choice; None if model, layout or batch differ."""
    same = config.model == old.model and config.parallel == old.parallel
    same = same and config.train.micro_batch_size == old.train.micro_batch_size
    same = same and config.train.global_batch_size == old.train.global_batch_size
    if not same or old.memory is None or old.memory.mode == "auto":
        return None
    try:
        return with_memory(config, old.memory.model_dump(mode="json", exclude_none=True))
    except UserError:
        return None


def _budget(config: Config, runtime: Runtime) -> float:
    """Bytes available for this rank's tables: what weights, optimizer and activations will leave.

    The model does not exist yet: its memory is planned.
    """
    assert config.memory is not None
    if config.memory.budget_gib is not None:
        return config.memory.budget_gib * 2**30
    planned = rank_memory(config, runtime.topology).total  # mode auto has no tables yet
    return max(0.0, USED_SHARE * _free_bytes(runtime.device) - planned)


def _free_bytes(device: torch.device) -> float:
    """Free memory of this rank."""
    if device.type == "cpu":
        return float(psutil.virtual_memory().available / local_world_size())
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return float(free)
