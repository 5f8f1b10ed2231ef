"""Activation checkpointing: keep a region's inputs and rerun its forward in the backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *args: object) -> Tensor:
    """function(*args), recomputed in the backward pass instead of keeping its activations.

    The function must be deterministic and free of side effects: no dropout, no lookups of tables.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
