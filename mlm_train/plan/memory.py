"""Memory of a rank, by formula.

Weights, gradients and optimizer are exact except for ZeRO's padding (a few elements per tensor). Buckets are
an estimate of ZeRO's temporary buffers, tables of the distinct ids in a step of text; activations are
estimated in plan/activations.py.
"""

from typing import NamedTuple

from mlm_train.config import Config
from mlm_train.parallel.build import shapes_of
from mlm_train.parallel.engine.deepspeed_zero import BUCKET
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.tensor.collectives import TensorGroup
from mlm_train.plan.activations import activation_bytes
from mlm_train.plan.ffn_m import expected_by_law, table_bytes

FP32 = 4


class RankMemory(NamedTuple):
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    tables: int
    activations: int

    @property
    def total(self) -> int:
        """The sum, without the runtime's own memory."""
        return sum(self)


def rank_memory(config: Config, topology: Topology) -> RankMemory:
    """Bytes that a rank needs for a training step."""
    elements = rank_elements(config, topology)
    state = state_bytes(config, elements, topology)
    tables = table_bytes(config, topology, expected_by_law(config, topology))
    return RankMemory(*state, int(tables), activation_bytes(config, topology))


def state_bytes(config: Config, elements: int, topology: Topology) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimizer and buckets of a rank whose model shard has `elements` elements.

    The optimizer has two moments, and from ZeRO stage 1 on also its own copy of its partition's weights.
    """
    zero = config.parallel.zero_stage
    whole, part = elements * FP32, -(-elements // topology.data) * FP32
    # One bucket of gradients being reduced, and one of weights gathered ahead.
    bucket = min(elements, BUCKET) * FP32
    buckets = bucket * ((zero >= 1) + (zero == 3))
    return (
        part if zero == 3 else whole,
        part if config.reduces_each_pass else whole,
        3 * part if zero else 2 * whole,
        buckets,
    )


def rank_elements(config: Config, topology: Topology) -> int:
    """Parameters of the largest rank, with the padding of tensor parallelism."""
    per_rank = []
    for rank in topology.along_pipeline():
        model = shapes_of(config, rank, TensorGroup(topology.tensor, 0))
        per_rank.append(sum(parameter.numel() for parameter in model.parameters()))
    return max(per_rank)
