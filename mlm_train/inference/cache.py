"""KV cache in one allocation, for rows of different lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.model.attention import LayerCache
from mlm_train.model.geometry import Geometry, single_document


class KVCache:
    """Keys and values of up to `capacity` columns in every layer (the protocol of model/attention.py).

    Rows end in the same column: row b has padding[b] columns before its first token, whose positions
    count from 0. Padding columns are never attended to by tokens. Without padding there is no mask.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        padding: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, len(padding), config.kv_heads, capacity, config.attention_head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._length = 0
        cos, sin, _ = single_document(config, capacity, device)
        self._cos, self._sin = cos.to(dtype), sin.to(dtype)  # once, not in each layer of each token
        self._padding: Tensor | None = None  # [rows, 1]
        if any(padding):
            self._padding = torch.tensor(padding, device=device).unsqueeze(1)
            # Columns that no forward writes are masked; a NaN there would come through all the same.
            self._keys[..., : max(padding), :] = self._values[..., : max(padding), :] = 0.0

    @property
    def length(self) -> int:
        """Number of cached columns."""
        return self._length

    @property
    def capacity(self) -> int:
        """Number of columns that there is room for."""
        return self._keys.shape[3]

    @property
    def padded(self) -> bool:
        """Whether some row has columns before its first token."""
        return self._padding is not None

    def geometry(self, rows: int, new: int) -> Geometry:
        """Geometry of the next `new` columns of the first `rows` rows.

        Raises ValueError where the capacity is exceeded.
        """
        start, stop = self._length, self._length + new
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, not {stop}")
        if self._padding is None and (new == 1 or start == 0):
            return Geometry(self._cos[start:stop], self._sin[start:stop])
        columns = torch.arange(stop, device=self._keys.device)
        queries = columns[start:, None]
        if self._padding is None:
            return Geometry(self._cos[start:stop], self._sin[start:stop], columns <= queries)
        padding = self._padding[:rows]
        # A padding column attends to itself: a softmax over nothing would be NaN.
        attends = (columns <= queries) & ((columns >= padding.unsqueeze(2)) | (columns == queries))
        positions = (columns[start:] - padding).clamp(min=0)
        return Geometry(
            self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1), attends.unsqueeze(1)
        )

    def layer(self, number: int) -> LayerCache:
        """The keys and values of a layer."""
        return LayerCache(self._keys[number], self._values[number], self._length)

    def layers(self) -> LayerCache:
        """The keys and values of all layers: [layers, rows, kv_heads, capacity, head_dim]."""
        return LayerCache(self._keys, self._values, self._length)

    def advance(self, new: int) -> None:
        """`new` columns have been appended to all layers."""
        self._length += new

    def crop(self, length: int) -> None:
        """Forget all but the first `length` columns."""
        self._length = min(length, self._length)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these (ascending), and the columns that are padding in all of them."""
        cut = 0
        if self._padding is not None:
            self._padding = self._padding[rows]
            cut = int(self._padding.min())
            self._padding = self._padding - cut
            if not self._padding.any():
                self._padding = None
        self._keys, self._values = self._kept(self._keys, rows, cut), self._kept(self._values, rows, cut)
        self._length -= cut

    def _kept(self, cached: Tensor, rows: Sequence[int], cut: int) -> Tensor:
        """Moved inside the same memory: only what is in use is copied."""
        cached[:, : len(rows), :, cut : self._length] = cached[:, rows, :, cut : self._length]
        return cached[:, : len(rows), :, cut:]
