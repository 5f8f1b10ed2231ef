"""Bytes a rank needs, by formula.

Weights, gradients and optimizer are exact, but for ZeRO's padding (a few elements a tensor). Buckets are an
estimate of what ZeRO-2 and 3 hold whole for a moment; activations are one of what autograd keeps for one
micro-batch, since one micro-batch lives at a time.
"""

from dataclasses import replace
from typing import NamedTuple

from mlm_train.config import Config
from mlm_train.model.loss import default_chunk
from mlm_train.parallel.build import shapes_of
from mlm_train.parallel.engine import BUCKET
from mlm_train.parallel.mappings import TensorGroup
from mlm_train.parallel.topology import Topology

FP32 = 4


class RankMemory(NamedTuple):
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, without the runtime's own memory."""
        return sum(self)


def rank_memory(config: Config, topology: Topology) -> RankMemory:
    """Bytes a rank needs for a training step."""
    elements = rank_elements(config, topology)
    state = state_bytes(config.parallel.zero, elements, topology)
    return RankMemory(*state, activation_bytes(config, topology.tensor))


def state_bytes(zero: int, elements: int, topology: Topology) -> tuple[int, int, int, int]:
    """Weights, gradients, optimizer and buckets of a rank whose model share has so many elements.

    The optimizer has two moments, and from stage 1 on its own copy of the weights of its part too. A
    pipeline's gradients stay whole until the end of the step (parallel/engine.py).
    """
    whole, part = elements * FP32, -(-elements // topology.data) * FP32
    cuts_gradients = zero == 3 or (zero == 2 and topology.pipeline == 1)
    # One bucket of gradients on their way, and of weights gathered ahead.
    bucket = min(elements, BUCKET) * FP32
    buckets = bucket * (cuts_gradients + (zero == 3))
    return (
        part if zero == 3 else whole,
        part if cuts_gradients else whole,
        3 * part if zero else 2 * whole,
        buckets,
    )


def rank_elements(config: Config, topology: Topology) -> int:
    """Parameters of the fullest rank, padding of tensor parallelism included."""
    found = []
    for stage in range(topology.pipeline):
        rank = replace(topology, rank=stage * topology.tensor * topology.data)
        model = shapes_of(config, rank, TensorGroup(topology.tensor, 0))
        found.append(sum(parameter.numel() for parameter in model.parameters()))
    return max(found)


def activation_bytes(config: Config, tensor: int = 1) -> int:
    """Estimate of what a micro-batch keeps for its backward pass.

    Elements a token and layer: residual and norms about 4 hidden, attention another 4; a SwiGLU keeps its
    two products, the activation and their product, 4 keys each. Tensor parallelism divides all but
    residual and norms. The head keeps a chunk's logits, the gradients of its weight and its input, and
    a copy of the weight where it computes in bf16.
    """
    model, tokens = config.model, config.train.micro_batch * config.data.sequence_length
    compute = 2 if config.train.precision == "bf16" else FP32
    ffn = 4 * model.intermediate_size
    if model.kind == "flex":
        ffn += (4 if model.compute_form == "swiglu" else 1) * (model.compute_intermediate_size or 0)
    layer = compute * (4 * model.hidden_size + (4 * model.hidden_size + ffn) // tensor)
    layer += FP32 * 2 * model.hidden_size
    words = -(-model.vocab_size // tensor)
    chunk = min(config.train.loss_chunk or default_chunk(words), tokens)
    copied = 0 if compute == FP32 else compute
    head = words * (chunk * (FP32 + copied) + model.hidden_size * (FP32 + copied))
    return tokens * (model.num_hidden_layers * layer + FP32 * model.hidden_size) + head
