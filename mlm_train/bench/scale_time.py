"""A predicted step time, from counted bytes and stated speeds: arithmetic, not a measurement."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlm_train.config import Config
from mlm_train.model.counts import train_flops_per_token

# Of one GPU, assumed: sustained matrix multiplications in bf16; links between nodes and within one, each way;
# and what an all-to-all takes per peer before its first byte.
FLOPS, BETWEEN_NODES, WITHIN_NODE, PER_PEER = 450e12, 40e9, 400e9, 3e-6
ASSUMED = (
    f"{FLOPS / 1e12:.0f} TFLOP/s, {BETWEEN_NODES / 1e9:.0f} GB/s per GPU between nodes, "
    f"{WITHIN_NODE / 1e9:.0f} GB/s within a node (tensor parallel), "
    f"{PER_PEER * 1e6:.0f} us per all-to-all peer"
)
RECOMPUTED = 4 / 3  # of FFN-M's work: its forward runs twice with tables
FSDP_BYTES = 6  # per parameter: gathered once in bf16, its gradient reduced once in fp32


class Times(NamedTuple):
    """Seconds of a step, one after the other: nothing is assumed to overlap."""

    compute: float
    tensor: float
    network: float
    latency: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(self)


def owned_times(config: Config, counted: Mapping[str, Any], ranks: int, stage_ranks: int) -> Times:
    """With owned FFN-M: computed once per distinct id of all ranks."""
    tokens = config.train.global_batch_size * config.data.sequence_length
    compute = _flops(config, RECOMPUTED * counted["union"] / tokens) * tokens / ranks / FLOPS
    exchanges = sum(calls for key, calls in counted["calls"].items() if "alltoall" in key)
    tensor = _bytes(counted, "tensor/") / WITHIN_NODE
    network = (
        _bytes(counted, "data/") + _bytes(counted, "stage/") + _bytes(counted, "pipeline/")
    ) / BETWEEN_NODES
    return Times(compute, tensor, network, exchanges * (stage_ranks - 1) * PER_PEER)


def fsdp_times(config: Config, counted: Mapping[str, Any], ranks: int, parameters: float) -> Times:
    """With FFN-M at every position, as one more part of what FSDP shards. parameters: of FFN-M per rank."""
    tokens = config.train.global_batch_size * config.data.sequence_length
    compute = _flops(config, 1.0) * tokens / ranks / FLOPS
    network = _bytes(counted, "data/") + _bytes(counted, "pipeline/") + FSDP_BYTES * parameters
    return Times(compute, _bytes(counted, "tensor/") / WITHIN_NODE, network / BETWEEN_NODES, 0.0)


def _flops(config: Config, evaluations: float) -> float:
    """Per token; evaluations: of FFN-M per token and layer."""
    return train_flops_per_token(config.model, config.data.sequence_length, evaluations)


def _bytes(counted: Mapping[str, Any], axis: str) -> int:
    return sum(size for key, size in counted["bytes"].items() if key.startswith(axis))
