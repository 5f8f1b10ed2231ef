"""Rows, layer by layer: decoded in the type and on the device that the model wants."""

from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.tol.format.index import X0
from mlm_train.tol.serve.reader import RowDecoder
from mlm_train.tol.serve.store import Rows
from mlm_train.utils.trace import span

TOGETHER = 1 << 20  # bytes: up to so many, all layers of the rows are decoded at once


class _Waiting(NamedTuple):
    """What a trace shows of a wait: the layer that asks first for bytes."""

    layer: int


class DecodedLayers:
    """The layers of n rows. Few rows are decoded whole, many layer by layer as their bytes arrive.

    The dozen operations of an int4 layer take longer to start than to run on a few rows; of many rows all
    layers at once would be more memory than a cache holds.
    """

    def __init__(
        self, decoder: RowDecoder, rows: Rows, count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._decoder, self._rows, self._dtype, self._device = decoder, rows, dtype, device
        self._at_once = decoder.alike is not None and count * decoder.size <= TOGETHER
        self._values: Tensor | None = None

    def __call__(self, layer: int) -> Tensor | None:
        """A layer, or X0: [n, hidden]; None for one that is not stored. Waits for its bytes alone."""
        columns = self._decoder.columns(layer)
        if columns is None:
            return None
        if not self._at_once or layer == X0:
            encoded = self._on_device(layer, *columns)
            return self._decoder.values(encoded, layer, self._dtype).to(self._dtype)
        return self._together()[:, self._decoder.number(layer)]

    def all_layers(self) -> Tensor | None:
        """All of the model's, [n, layers, hidden]; None where they are not decoded together."""
        return self._together() if self._at_once and self._decoder.complete else None

    def _together(self) -> Tensor:
        if self._values is None:
            rows = self._on_device(0, self._decoder.start, self._decoder.size)
            self._values = self._decoder.all_values(rows, self._dtype)
        return self._values

    def _on_device(self, layer: int, first: int, last: int) -> Tensor:
        with span("tol.wait", _Waiting(layer)):
            encoded = self._rows.columns(first, last)
        return encoded.to(self._device, non_blocking=True)
