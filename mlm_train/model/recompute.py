"""Activation checkpointing: keep a region's inputs and run its forward again in the backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    """function(*args), whose inner activations are not kept for the backward pass.

    Regions hold no lookups and no dropout: nothing random, nothing that counts its calls.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
