"""The model: embedding, blocks, final norm, head."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mlm_train.config import ModelConfig
from mlm_train.model.attention import KeyValueCache
from mlm_train.model.block import BaseBlock, Block, MemoryBlock
from mlm_train.model.geometry import separate_documents, single_document
from mlm_train.model.linear import Linear, compute_dtype, linear
from mlm_train.model.source import EmbeddingSource, MemoryReader, MemorySource


class TokenEmbedding(nn.Embedding):
    """The embedding, x0 of a token; its weight is also the head's where they are tied."""

    def rows(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> their rows [..., hidden]."""
        return self(ids)


class Transformer(nn.Module):
    """base, memory or flex (arXiv 2602.00398, equations 1 to 4), or some consecutive layers of one.

    memory and flex need a memory source at each call. `with_memory=False` builds them without FFN-M's
    weights, for inference from a ToL. `layers`: their numbers (default: all); `embeds`, `heads`: whether the
    embedding, and final norm and head, are included. Weights have the same names as in the whole model.
    """

    separator: int | None = None  # the id that ends a document; None: rows are not split into documents

    def __init__(
        self,
        config: ModelConfig,
        with_memory: bool = True,
        layers: Iterable[int] | None = None,
        embeds: bool = True,
        heads: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.with_memory = config, with_memory
        self.embed_tokens: TokenEmbedding | None = None
        self.norm: nn.RMSNorm | None = None
        self.lm_head: Linear | None = None
        if embeds or (heads and config.tie_word_embeddings):
            self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        numbers = range(config.num_hidden_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(layer): self._block(layer) for layer in numbers})
        if heads:
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if heads and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def _block(self, layer: int) -> nn.Module:
        if self.config.has_memory:
            return MemoryBlock(self.config, layer, self.with_memory)
        return BaseBlock(self.config, layer)

    def part(self, layers: Iterable[int], heads: bool) -> "Transformer":
        """Some of the layers, and norm and head if `heads`, as a model that shares this one's modules."""
        part = Transformer(self.config, self.with_memory, (), embeds=False, heads=False)
        part.separator, part.embed_tokens = self.separator, self.embed_tokens
        part.layers = nn.ModuleDict({str(layer): self.layers[str(layer)] for layer in layers})
        if heads:
            part.norm, part.lm_head = self.norm, self.lm_head
        return part

    def scaled(self, memory_scale: Sequence[float]) -> "Transformer":
        """This model with another alpha per layer; it shares this one's weights."""
        scaled = self.part(range(self.config.num_hidden_layers), heads=True)
        scaled.config = self.config.model_copy(update={"memory_scale": list(memory_scale)})
        scaled.training = self.training
        for layer, block in self.memory_blocks().items():
            other = copy.copy(block)  # a new object with the same parameters and modules
            other.alpha = memory_scale[layer]
            scaled.layers[str(layer)] = other
        return scaled

    def block(self, layer: int) -> Block:
        """A layer by its number in the whole model."""
        block = self.layers[str(layer)]
        assert isinstance(block, Block)
        return block

    def memory_blocks(self) -> dict[int, MemoryBlock]:
        """Layer number -> block, of the layers that have FFN-M, for a memory source."""
        return {block.layer: block for block in self.layers.values() if isinstance(block, MemoryBlock)}

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> x0 [..., hidden]."""
        assert self.embed_tokens is not None
        return self.embed_tokens(ids)

    def rows(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> their embeddings [..., hidden], on every rank that shards the embedding."""
        assert self.embed_tokens is not None
        return self.embed_tokens.rows(ids)

    def open(
        self, ids: Tensor, source: MemorySource | None = None, x0: Tensor | None = None
    ) -> tuple[Tensor, MemoryReader | None]:
        """x0 of ids [...], where the caller does not have it, and FFN-M's output for the layers.

        A model without an embedding gets both from an EmbeddingSource.
        """
        if x0 is None and self.embed_tokens is None:
            assert isinstance(source, EmbeddingSource)
            return source.open_with_x0(ids, next(self.parameters()).dtype)
        x0 = self.embed(ids) if x0 is None else x0
        return x0, None if source is None else source.open(ids, x0)

    def run_layers(
        self,
        x: Tensor,
        read: MemoryReader | None,
        ids: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Run the residual stream x [batch, local positions, hidden] through the layers.

        ids int64 [batch, sequence]: those of all positions, also under sequence parallelism.
        """
        if cache is not None:
            geometry = cache.geometry(*ids.shape)
        elif self.separator is not None:
            geometry = separate_documents(self.config, ids, self.separator, compute_dtype(x))
        else:
            geometry = single_document(self.config, ids.shape[1], x.device)
        for number, layer in self.layers.items():
            x = layer(x, geometry, read, None if cache is None else cache.layer(int(number)))
        if cache is not None:
            cache.advance(ids.shape[1])
        return x

    def hidden(
        self,
        ids: Tensor,
        source: MemorySource | None = None,
        cache: KeyValueCache | None = None,
        x0: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """ids int64 [batch, sequence] -> the normed last hidden state [batch, sequence, hidden].

        `x0`: the embeddings of ids, where the caller has them; a model without an embedding gets them from an
        EmbeddingSource. `x`: the residual stream, where these are not the first layers. Without the final
        norm the last hidden state is returned as it is.
        """
        if x is None:
            x, read = self.open(ids, source, x0)
        else:
            read = source.open(ids, x0) if source is not None else None
        x = self.run_layers(x, read, ids, cache)
        return x if self.norm is None else self.norm(x)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight [vocabulary, hidden]; the embedding's where they are tied."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        assert head is not None
        return head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Normed hidden [..., hidden] -> logits [..., vocabulary]."""
        return linear(hidden, self.head_weight)

    def forward(
        self,
        ids: Tensor,
        source: MemorySource | None = None,
        cache: KeyValueCache | None = None,
        loss: Callable[[Tensor, Tensor], Any] | None = None,
        x0: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Any:
        """ids int64 [batch, sequence] -> logits [batch, sequence, vocabulary]; hidden without a head.

        With `loss`: loss(normed hidden [batch, sequence, hidden], head weight [vocabulary, hidden]).
        `x0`, `x`: as in `hidden`.
        """
        hidden = self.hidden(ids, source, cache, x0, x)
        if self.norm is None:
            return hidden
        return self.head(hidden) if loss is None else loss(hidden, self.head_weight)
