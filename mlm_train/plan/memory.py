"""Bytes a rank needs, by formula.

Weights, gradients and optimizer are exact; activations are an estimate of what autograd keeps for one
micro-batch, since one micro-batch lives at a time.
"""

from typing import NamedTuple

from mlm_train.config import Config
from mlm_train.model.counts import count_parameters
from mlm_train.parallel.topology import Topology

FP32 = 4


class RankMemory(NamedTuple):
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, without the runtime's own memory."""
        return sum(self)


def rank_memory(config: Config, topology: Topology) -> RankMemory:
    """Bytes a rank needs for a training step."""
    weights = count_parameters(config.model).stored * FP32
    # ZeRO-1 keeps an fp32 copy and two moments of this rank's share.
    optimizer = -(-3 * weights // topology.data)
    return RankMemory(weights, weights, optimizer, activation_bytes(config))


def activation_bytes(config: Config) -> int:
    """Estimate of what a micro-batch keeps for its backward pass.

    Elements a token and layer: residual, norms and attention about 8 hidden; a SwiGLU keeps its two
    products, the activation and their product, 4 keys each. The head keeps logits twice in fp32.
    """
    model, tokens = config.model, config.train.micro_batch * config.data.sequence_length
    compute = 2 if config.train.precision == "bf16" else FP32
    ffn = 4 * model.intermediate_size
    if model.kind == "flex":
        ffn += (4 if model.compute_form == "swiglu" else 1) * (model.compute_intermediate_size or 0)
    layer = compute * (8 * model.hidden_size + ffn) + FP32 * 2 * model.hidden_size
    return tokens * (model.num_hidden_layers * layer + 2 * FP32 * model.vocab_size)
