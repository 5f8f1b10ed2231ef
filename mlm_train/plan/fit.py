"""Whether a rank's state fits its memory, and the smallest layout in which it would."""

from collections.abc import Iterator
from typing import Any

import psutil
import torch

from mlm_train.config import Config
from mlm_train.config.load import parse_config
from mlm_train.errors import UserError
from mlm_train.model.counts import count_parameters
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.plan.memory import RankMemory, rank_memory

GIB = 2**30
STATE = ("weights", "gradients", "optimizer", "buckets")  # what is exact; activations come on top
LEAST = 16  # bytes per parameter with nothing sharded: fp32 weight, gradient and moments
MOST_RANKS = 4096
TENSOR = (1, 2, 4, 8)


def check_memory(config: Config, topology: Topology, available: int) -> None:
    """Raise UserError where a rank's weights, gradients and optimizer alone exceed the available bytes."""
    if LEAST * count_parameters(config.model).stored <= available:
        return  # even without any sharding
    memory = rank_memory(config, topology)
    if _state(memory) <= available:
        return
    parts = ", ".join(f"{name} {getattr(memory, name) / GIB:,.0f}" for name in STATE)
    fitting = next(_fitting(config, topology, available), None)
    fix = f"{fitting} would do" if fitting else f"no layout of up to {MOST_RANKS} processes would do"
    raise UserError(
        f"a rank would hold {_state(memory) / GIB:,.0f} GiB ({parts}), and has {available / GIB:,.1f}: {fix}"
    )


def rank_bytes(config: Config, local_ranks: int) -> int:
    """Memory of a rank: its GPU's, or its part of the machine's."""
    if config.train.device == "cpu" or not torch.cuda.is_available():
        return int(psutil.virtual_memory().total // max(local_ranks, 1))
    return int(torch.cuda.get_device_properties(0).total_memory)


def _state(memory: RankMemory) -> int:
    return sum(getattr(memory, name) for name in STATE)


def _fitting(config: Config, topology: Topology, available: int) -> Iterator[str]:
    """Yield layouts that fit, those of fewest processes first."""
    ranks = 1
    while ranks <= MOST_RANKS:
        for tensor in TENSOR:
            model_ranks = tensor * config.parallel.pipeline
            if ranks < model_ranks or ranks < topology.world:
                continue
            try:
                candidate = _with_fsdp(config, tensor)
                layout = Topology.of(candidate.parallel, ranks)
            except UserError:  # heads that it does not divide, for instance
                continue
            if _state(rank_memory(candidate, layout)) <= available:
                sliced = f" parallel.tensor={tensor}" if tensor > 1 else ""
                owned = " memory.mode=table memory.placement=owned" if candidate.memory else ""
                yield f"parallel.engine=fsdp{owned}{sliced} on {ranks} processes"
        ranks *= 2


def _with_fsdp(config: Config, tensor: int) -> Config:
    """The config with FSDP, FFN-M owned, and this tensor-parallel size."""
    tree: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    for name in ("zero_stage", "shard", "replicate"):
        tree["parallel"].pop(name, None)
    tree["parallel"] |= {"engine": "fsdp", "tensor": tensor, "sequence": False}
    if config.memory is not None:
        tree["memory"] = {"mode": "table", "placement": "owned"}
    return parse_config(tree)
