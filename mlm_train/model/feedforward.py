"""Feed-forward networks. FFN, FFN-M and the default FFN-C are SwiGLU."""

import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.model.linear import FusedLinear, Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no bias (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear(
            hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        )
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        return self.down_proj(self.coefficients(x))

    def coefficients(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., intermediate]: the factor on each column of down_proj's weight."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return F.silu(gate) * up


class LinearFFN(nn.Module):
    """FFN-C as the paper's "linear dense module": down(up(x)), no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        return self.down_proj(self.up_proj(x))
