"""Rotary position embedding, half-rotation form (arXiv 2104.09864, as Llama arranges it)."""

import torch
from torch import Tensor


def rotary_angles(head_dim: int, theta: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin of positions int64 [...], each [..., head_dim], always in fp32.

    The first half of sin is negated, which saves `rotate` a pass over the heads to negate theirs.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / theta**exponent)
    angles = torch.cat((angles, angles), -1)
    cos, sin = angles.cos(), angles.sin()
    sin[..., : head_dim // 2].neg_()
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [batch, heads, sequence, head_dim] by its positions; cos, sin are broadcast to its shape."""
    if torch.compiler.is_compiling():  # inductor does not vectorise a roll
        halves_swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    else:
        halves_swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos.to(x.dtype), halves_swapped, sin.to(x.dtype))
