"""Causal self-attention with grouped key-value heads."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.config import ModelConfig
from mlm_train.kernels.cpu_attention import causal_attention, causal_attention_applies
from mlm_train.model.geometry import Geometry
from mlm_train.model.linear import FusedLinear, Linear
from mlm_train.model.recompute import recomputed
from mlm_train.model.rope import rotate


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens; inference/ implements it."""

    def geometry(self, rows: int, new: int) -> Geometry:
        """Geometry of the next `new` tokens of the first `rows` rows, whose keys are the cached ones too."""
        ...

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [batch, kv_heads, new, head_dim]; return [batch, kv_heads, all, head_dim], in order."""
        ...


class Attention(nn.Module):
    """The paper's Attn: Llama's attention, without bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.attention_head_dim
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = FusedLinear(
            config.hidden_size, {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width}
        )
        self.o_proj = Linear(width, config.hidden_size)
        self.recompute = False  # what lies between qkv_proj and o_proj, in the backward pass

    def forward(
        self,
        x: Tensor,
        geometry: Geometry,
        layer: int = 0,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x [batch, sequence, hidden] -> the same shape; a cache adds earlier tokens."""
        qkv = self.qkv_proj(x)
        if self.recompute and cache is None:
            return self.o_proj(recomputed(self._attend, qkv, geometry))
        return self.o_proj(self._attend(qkv, geometry, layer, cache))

    def _attend(
        self,
        qkv: Tensor,
        geometry: Geometry,
        layer: int = 0,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """qkv [batch, sequence, (heads + 2 * kv_heads) * head_dim] -> [batch, sequence, heads * head_dim]."""
        batch, length, _ = qkv.shape
        qkv = qkv.view(batch, length, -1, self.head_dim).transpose(1, 2)
        query_key, value = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        query, key = rotate(query_key, geometry.cos, geometry.sin).split([self.heads, self.kv_heads], dim=1)
        mask, causal = geometry.mask, False
        if length > 1:  # a branch, since `length > 1` is symbolic in a graph compiled for any length
            causal = mask is None
        if cache is not None:
            key, value = cache.append(layer, key, value)
        if cache is None and causal and causal_attention_applies(query, key):
            out = causal_attention(query, key, value)
        else:
            grouped = self.heads != self.kv_heads
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )
        return out.transpose(1, 2).reshape(batch, length, -1)
