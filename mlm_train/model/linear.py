"""Linear layers without bias; those that share an input are fused into one matmul."""

import torch
from torch import Tensor, nn

from mlm_train.model.logical import Part


class FusedLinear(nn.Linear):
    """Linear layers of one input, stacked along the output: one matmul instead of several.

    `parts` maps each layer's logical name (`q_proj`) to its number of rows in the weight; outside the running
    model (initialisation, checkpoints, exports) only the logical names exist (model/logical.py).
    """

    def __init__(self, in_features: int, parts: dict[str, int]) -> None:
        super().__init__(in_features, sum(parts.values()), bias=False)
        self.parts = parts

    def logical_parts(self) -> list[Part]:
        """One part per fused layer."""
        parts, start = [], 0
        for name, rows in self.parts.items():
            parts.append(Part(name, 0, start, rows, 0, rows))
            start += rows
        return parts


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matmuls with x: autocast's where it is enabled, except for float64, as autocast itself."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
