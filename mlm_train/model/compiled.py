"""torch.compile of a layer's regions, with one graph for all layers."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def compiled(region: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The compiled region; it is compiled at its first call. Lookups, head and loss are not in regions."""
    return torch.compile(region)
