"""Rotary position embedding, half-rotation form (arXiv 2104.09864, as Llama arranges it)."""

import torch
from torch import Tensor


def rotary_angles(
    head_dim: int, theta: float, start: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos, sin of positions start .. start+length-1, each [length, head_dim], always in fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponent).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, heads, sequence, head_dim] by its positions."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
