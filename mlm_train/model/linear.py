"""Linear layers without bias; those that share an input are fused into one matmul."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_train.model.logical import Part


class Linear(nn.Linear):
    """A linear layer without bias, by `linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return linear(x, self.weight)


class FusedLinear(Linear):
    """Linear layers of one input, stacked along the output: one matmul instead of several.

    `parts` maps each layer's logical name (`q_proj`) to its number of rows in the weight; outside the running
    model (initialisation, checkpoints, exports) only the logical names exist (model/logical.py).
    """

    def __init__(self, in_features: int, parts: dict[str, int]) -> None:
        super().__init__(in_features, sum(parts.values()))
        self.parts = parts

    def logical_parts(self) -> list[Part]:
        """One part per fused layer."""
        parts, start = [], 0
        for name, rows in self.parts.items():
            parts.append(Part(name, 0, start, rows, 0, rows))
            start += rows
        return parts


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] -> x weight^T [..., out]."""
    if _is_one_row(x, weight):
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def _is_one_row(x: Tensor, weight: Tensor) -> bool:
    """Whether x is the one row of a decoded token, on a CPU in bfloat16.

    Then the time is that of reading the weight, which torch's matrix-vector product does 1.3 times faster
    than its matmul with one row, and as exactly (docs/serving.md).
    """
    return (
        not torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() == x.shape[-1]
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matmuls with x: autocast's where it is enabled, except for float64, as autocast itself."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
