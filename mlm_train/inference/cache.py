"""Keys and values of past tokens, in one allocation."""

import torch
from torch import Tensor

from mlm_train.config import ModelConfig


class KVCache:
    """Room for `capacity` tokens of `batch` sequences in every layer (model/attention.py's protocol)."""

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
        """Tokens held. All layers of a forward see the same number: the last one's append moves it."""
        return self._length

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add [batch, kv_heads, new, head_dim]; views of all tokens so far, old ones first.

        Raises ValueError when the capacity is exceeded.
        """
        start, stop = self._length, self._length + key.shape[2]
        if stop > self._keys.shape[3]:
            raise ValueError(f"the cache holds {self._keys.shape[3]} tokens, not {stop}")
        self._keys[layer, :, :, start:stop] = key
        self._values[layer, :, :, start:stop] = value
        if layer == self._keys.shape[0] - 1:
            self._length = stop
        return self._keys[layer, :, :, :stop], self._values[layer, :, :, :stop]
