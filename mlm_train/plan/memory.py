"""Memory of a rank, by formula.

Weights, gradients and optimizer are exact except for padding (a few elements per tensor). Buckets are an
estimate of ZeRO's temporary buffers, or of the weights that FSDP has gathered; tables of the distinct ids
in a step of text; activations are estimated in plan/activations.py.
"""

from collections import defaultdict
from typing import NamedTuple

from mlm_train.config import Config
from mlm_train.parallel.build import shapes_of
from mlm_train.parallel.engine.deepspeed_zero import BUCKET
from mlm_train.parallel.engine.fsdp import whole_parameters
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.tensor.collectives import TensorGroup
from mlm_train.plan.activations import activation_bytes
from mlm_train.plan.ffn_m import expected_by_law, table_bytes

FP32, BF16 = 4, 2


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
    size = rank_size(config, topology)
    of_engine = fsdp_bytes if config.parallel.engine == "fsdp" else state_bytes
    state = of_engine(config, size, topology)
    tables = table_bytes(config, topology, expected_by_law(config, topology))
    return RankMemory(*state, int(tables), activation_bytes(config, topology))


class RankSize(NamedTuple):
    """Parameters of a rank, with the padding of tensor parallelism."""

    elements: int
    whole: int  # those that FSDP does not shard
    block: int  # the largest block's of those that it does


def state_bytes(config: Config, size: RankSize, topology: Topology) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimizer and buckets of a rank.

    The optimizer has two moments, and from ZeRO stage 1 on also its own copy of its partition's weights.
    """
    zero, elements = config.parallel.zero, size.elements
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


def fsdp_bytes(config: Config, size: RankSize, topology: Topology) -> tuple[int, int, int, int]:
    """The same under FSDP. Buckets are the gathered weights: of two blocks, with a pipeline of all."""
    parallel, bf16 = config.parallel, config.train.precision == "bf16"
    if topology.data == 1:
        return FP32 * size.elements, FP32 * size.elements, 2 * FP32 * size.elements, 0
    _, ranks = parallel.sharding(topology.data)
    sharded = size.elements - size.whole
    mine = size.whole - (-sharded // ranks)
    gathered = sharded if topology.pipeline > 1 else min(2 * size.block, sharded)
    gradients = mine if parallel.reduce_each_micro_batch else size.elements
    reduced = BF16 if bf16 and parallel.reduce_dtype == "bf16" else FP32
    return (
        FP32 * mine,
        reduced * gradients,
        2 * FP32 * mine,
        (BF16 if bf16 else FP32) * gathered,
    )


def rank_size(config: Config, topology: Topology) -> RankSize:
    """The size of the largest rank."""
    sizes = []
    for rank in topology.along_pipeline():
        model = shapes_of(config, rank, TensorGroup(topology.tensor, 0))
        whole = whole_parameters(model, config, rank)
        blocks: dict[str, int] = defaultdict(int)
        for name, parameter in model.named_parameters():
            blocks["" if name in whole else ".".join(name.split(".")[:2])] += parameter.numel()
        unsharded = blocks.pop("", 0)
        sizes.append(RankSize(unsharded + sum(blocks.values()), unsharded, max(blocks.values())))
    return max(sizes)
