"""Rotary position embedding, half-rotation form (arXiv 2104.09864, as Llama arranges it)."""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """cos and sin of positions; angles are computed in fp32 whatever the compute dtype."""

    inverse_frequency: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inverse_frequency", 1.0 / theta**exponent, persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin of positions start .. start+length-1, each [length, head_dim]."""
        device = self.inverse_frequency.device
        positions = torch.arange(start, start + length, device=device, dtype=torch.float32)
        angles = torch.outer(positions, self.inverse_frequency.float()).repeat(1, 2)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [batch, heads, sequence, head_dim] by its positions."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
