"""KV cache in one allocation."""

import torch
from torch import Tensor

from mlm_train.config import ModelConfig


class KVCache:
    """Keys and values of up to `capacity` tokens in every layer (the protocol of model/attention.py)."""

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.kv_heads, capacity, config.attention_head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._length = 0

    @property
    def length(self) -> int:
        """Number of cached tokens; it grows with the last layer's append, so all layers see the same."""
        return self._length

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [batch, kv_heads, new, head_dim]. Returns views of all cached tokens, oldest first.

        Raises ValueError where the capacity is exceeded.
        """
        start, stop = self._length, self._length + key.shape[2]
        if stop > self._keys.shape[3]:
            raise ValueError(f"the cache holds {self._keys.shape[3]} tokens, not {stop}")
        self._keys[layer, :, :, start:stop] = key
        self._values[layer, :, :, start:stop] = value
        if layer == self._keys.shape[0] - 1:
            self._length = stop
        return self._keys[layer, :, :, :stop], self._values[layer, :, :, :stop]
