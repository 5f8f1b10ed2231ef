"""The whole model: embedding, blocks, final norm, head."""

import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.config import ModelConfig
from mlm_train.model.attention import KeyValueCache
from mlm_train.model.block import BaseBlock, MemoryBlock
from mlm_train.model.rope import rotary_angles
from mlm_train.model.source import MemorySource


class TokenEmbedding(nn.Embedding):
    """x0 of a token; the head too, where it is tied."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> logits [..., vocabulary]."""
        return F.linear(hidden, self.weight)


class Transformer(nn.Module):
    """base, memory or flex (arXiv 2602.00398, equations 1 to 4).

    memory and flex need a memory source at each call. `with_memory=False` builds them without
    FFN-M's weights, for serving from a ToL.
    """

    def __init__(self, config: ModelConfig, with_memory: bool = True) -> None:
        super().__init__()
        self.config, self.with_memory = config, with_memory
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MemoryBlock(config, layer, with_memory) if config.has_memory else BaseBlock(config, layer)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def memory_blocks(self) -> list[MemoryBlock]:
        """The blocks that have FFN-M: what a training source computes with."""
        return [block for block in self.layers if isinstance(block, MemoryBlock)]

    def hidden(
        self,
        ids: Tensor,
        source: MemorySource | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """ids int64 [batch, sequence] -> the last hidden state, normed [batch, sequence, hidden]."""
        x = x0 = self.embed_tokens(ids)
        read = source.open(ids, x0) if source is not None else None
        start = cache.length if cache is not None else 0
        config = self.config
        rope = rotary_angles(config.attention_head_dim, config.rope_theta, start, ids.shape[1], x.device)
        for block in self.layers:
            x = block(x, rope, read, cache)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> logits [..., vocabulary]."""
        return self.embed_tokens.logits(hidden) if self.lm_head is None else self.lm_head(hidden)

    def forward(
        self,
        ids: Tensor,
        source: MemorySource | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """ids int64 [batch, sequence] -> logits [batch, sequence, vocabulary]."""
        return self.head(self.hidden(ids, source, cache))
