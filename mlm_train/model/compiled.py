"""torch.compile of the regions that a layer runs, one graph for the layers of a kind."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def compiled(region: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A region, compiled at its first call; lookups, the head and its loss lie outside of regions."""
    return torch.compile(region)
