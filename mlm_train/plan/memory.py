"""Memory of a rank, by formula.

Weights, gradients and optimizer are exact except for padding (a few elements per tensor). Buckets are an
estimate of ZeRO's temporary buffers and autocast's copies of weights, or of whole copies of weights under
FSDP; tables of the distinct ids in a step of text; activations are estimated in plan/activations.py.
"""

from collections import defaultdict
from typing import NamedTuple

from mlm_train.config import Config
from mlm_train.parallel.build import shapes_of
from mlm_train.parallel.engine.deepspeed_zero import BUCKET
from mlm_train.parallel.engine.fsdp import EMBEDDING, whole_parameters
from mlm_train.parallel.mesh.sharded import owned_parameters
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.stages import owners_of
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

    sharded: int  # over data parallel, where the engine shards
    block: int  # of those, the largest block's
    copied: int  # those of which every data-parallel rank has a whole copy
    rows: int  # of the embedding, where its rows are owned
    owned: int  # of FFN-M, where layers are owned: those that the rank updates
    held: int  # and those of which it has a copy

    @property
    def elements(self) -> int:
        """Those of a rank without any sharding over data parallel."""
        return self.sharded + self.copied


def state_bytes(config: Config, size: RankSize, topology: Topology) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimizer and buckets of a rank.

    The optimizer has two moments, and from ZeRO stage 1 on also its own copy of its partition's weights.
    """
    zero, elements = config.parallel.zero, size.elements
    whole, part = elements * FP32, -(-elements // topology.data) * FP32
    # One bucket of gradients being reduced, one of weights gathered ahead, autocast's copies of all weights.
    bucket = min(elements, BUCKET) * FP32
    copies = BF16 * elements if config.train.precision == "bf16" else 0
    buckets = bucket * ((zero >= 1) + (zero == 3)) + copies
    return (
        part if zero == 3 else whole,
        part if config.reduces_each_pass else whole,
        3 * part if zero else 2 * whole,
        buckets,
    )


def fsdp_bytes(config: Config, size: RankSize, topology: Topology) -> tuple[int, int, int, int]:
    """The same under FSDP. Buckets are whole copies of weights: those gathered, of two blocks or of
    all that are kept until the backward pass; and those of FFN-M and a tied embedding, which are never freed.
    """
    parallel, bf16 = config.parallel, config.train.precision == "bf16"
    computed = BF16 if bf16 else FP32
    # A single owner's fp32 weights are its copy.
    own_copies = computed * size.held if bf16 or size.held > size.owned else 0
    if topology.data == 1:
        mine = size.elements + size.owned
        return FP32 * mine, FP32 * (size.elements + size.held), 2 * FP32 * mine, own_copies
    _, ranks = parallel.sharding(topology.data)
    shard = -(-size.sharded // ranks)
    mine = shard + -(-size.copied // topology.data) + size.rows + size.owned
    gathered = min(2 * size.block, size.sharded) if parallel.reshards else size.sharded
    reduced = BF16 if bf16 and parallel.reduce_dtype == "bf16" else FP32
    gradients = reduced * (shard if parallel.reduce_each_micro_batch else size.sharded)
    return (
        FP32 * mine,
        gradients + FP32 * (size.copied + size.rows + size.held),
        2 * FP32 * mine,
        computed * gathered + FP32 * size.copied + own_copies,
    )


def rank_size(config: Config, topology: Topology) -> RankSize:
    """The size of the largest rank."""
    return max(_size(config, rank) for rank in topology.along_pipeline())


def _size(config: Config, topology: Topology) -> RankSize:
    model = shapes_of(config, topology, TensorGroup(topology.tensor, 0))
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    owned_names = owned_parameters(model).keys()
    copied_names = whole_parameters(model, config, topology)
    blocks: dict[str, int] = defaultdict(int)
    for name, elements in parameters.items():
        if name not in owned_names and name not in copied_names:
            blocks[".".join(name.split(".")[:2])] += elements
    copied = sum(parameters[name] for name in copied_names)
    rows = parameters[EMBEDDING] if EMBEDDING in owned_names else 0
    owned, held = _owned(config, topology)
    return RankSize(sum(blocks.values()), max(blocks.values()), copied, rows, owned, held)


def _owned(config: Config, topology: Topology) -> tuple[int, int]:
    """Elements of the FFN-M that a rank updates, and of which it has a copy, at most."""
    owners = owners_of(config, topology)
    if owners is None:
        return 0, 0
    layer = config.model.hidden_size * (3 * config.model.intermediate_size + 1)
    most = max(len(owners.held(rank)) for rank in range(owners.ranks))
    return -(-len(owners.layers) * layer // owners.ranks), most * layer
