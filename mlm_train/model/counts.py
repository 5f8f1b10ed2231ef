"""Parameters and floating-point operations, by formula."""

from typing import NamedTuple

from mlm_train.config import ModelConfig


class Parameters(NamedTuple):
    """Numbers of elements. total and active exclude embedding and head, as in the paper."""

    total: int
    active: int
    ffn_m: int
    embedding: int
    head: int

    @property
    def stored(self) -> int:
        """All elements of the model in training."""
        return self.total + self.embedding + self.head


def count_parameters(config: ModelConfig) -> Parameters:
    """Count a model's parameters; `active` excludes FFN-M, which is served from a ToL."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    matrices = layer_matrices(config)
    # There is a norm before each of them, and one before the head.
    total = layers * sum(elements + hidden for elements in matrices if elements) + hidden
    ffn_m = layers * (matrices.ffn + hidden) if config.has_memory else 0
    embedding = config.vocab_size * hidden
    head = 0 if config.tie_word_embeddings else embedding
    return Parameters(total, total - ffn_m, ffn_m, embedding, head)


class Matrices(NamedTuple):
    """Elements of one layer's weight matrices; ffn: base's FFN, or FFN-M; compute: FFN-C."""

    attention: int
    ffn: int
    compute: int


def layer_matrices(config: ModelConfig) -> Matrices:
    """Those of a layer of this model."""
    hidden = config.hidden_size
    width = config.num_attention_heads * config.attention_head_dim
    kv_width = config.kv_heads * config.attention_head_dim
    compute = 0
    if config.kind == "flex":
        matrices = 3 if config.compute_form == "swiglu" else 2
        assert config.compute_intermediate_size is not None
        compute = matrices * hidden * config.compute_intermediate_size
    return Matrices(hidden * (2 * width + 2 * kv_width), 3 * hidden * config.intermediate_size, compute)


def train_flops_per_token(config: ModelConfig, sequence_length: int, ffn_m_ratio: float = 1.0) -> float:
    """Forward and backward FLOPs per token, the numerator of MFU.

    6 * (elements of the active weight matrices, head included) + 6 * elements of FFN-M's * ffn_m_ratio
    + 6 * layers * width * sequence, the last for causal attention (two matmuls over sequence/2 on average,
    three passes). Norms, softmax and lookups are not counted. `ffn_m_ratio`: FFN-M evaluations per token and
    layer, 1 with memory.mode=per_token.
    """
    layers, matrices = config.num_hidden_layers, layer_matrices(config)
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.attention_head_dim
    ffn = layers * matrices.ffn * (ffn_m_ratio if config.has_memory else 1.0)
    elements = layers * (matrices.attention + matrices.compute) + ffn + head
    return 6.0 * elements + 6 * layers * width * sequence_length
