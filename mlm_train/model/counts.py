"""Parameters and floating-point operations, by formula."""

from typing import NamedTuple

from mlm_train.config import ModelConfig


class Parameters(NamedTuple):
    """Counts of elements. total and active leave embedding and head out, as the paper does."""

    total: int
    active: int
    ffn_m: int
    embedding: int
    head: int

    @property
    def stored(self) -> int:
        """Elements that a training process holds in all."""
        return self.total + self.embedding + self.head


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of a model; `active` is what remains when FFN-M is served from a ToL."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = config.num_attention_heads * config.attention_head_dim
    kv_width = config.kv_heads * config.attention_head_dim
    attention = hidden * (2 * width + 2 * kv_width) + hidden
    ffn = 3 * hidden * config.intermediate_size + hidden
    compute = 0
    if config.kind == "flex":
        products = 3 if config.compute_form == "swiglu" else 2
        assert config.compute_intermediate_size is not None
        compute = products * hidden * config.compute_intermediate_size + hidden
    total = layers * (attention + ffn + compute) + hidden
    ffn_m = layers * ffn if config.has_memory else 0
    embedding = config.vocab_size * hidden
    head = 0 if config.tie_word_embeddings else embedding
    return Parameters(total, total - ffn_m, ffn_m, embedding, head)


def train_flops_per_token(config: ModelConfig, sequence_length: int, distinct_ratio: float = 1.0) -> float:
    """Forward and backward FLOPs a token: what MFU divides by the peak.

    6 * (active parameters + head) + 6 * FFN-M * distinct_ratio + 6 * layers * width * sequence, the
    last for causal attention (two products of sequence/2 on average, three passes). Norms and softmax
    are left out. `distinct_ratio`: FFN-M evaluations a token, 1 with memory.mode=per_token.
    """
    counts = count_parameters(config)
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.attention_head_dim
    attention = 6 * config.num_hidden_layers * width * sequence_length
    return 6.0 * (counts.active + head) + 6.0 * counts.ffn_m * distinct_ratio + attention
