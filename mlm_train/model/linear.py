"""Linear products without bias; several that share an input are one product."""

import torch
from torch import Tensor, nn

from mlm_train.model.logical import Part


class FusedLinear(nn.Linear):
    """Products of one input stacked along the output: one matmul instead of several.

    `parts` maps each product's logical name (`q_proj`) to its rows of the weight; outside the running
    model (initialisation, checkpoints, exports) only the logical names exist (model/logical.py).
    """

    def __init__(self, in_features: int, parts: dict[str, int]) -> None:
        super().__init__(in_features, sum(parts.values()), bias=False)
        self.parts = parts

    def logical_parts(self) -> list[Part]:
        """One part a product."""
        found, start = [], 0
        for name, rows in self.parts.items():
            found.append(Part(name, 0, start, rows, 0, rows))
            start += rows
        return found


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of products with x: autocast's where it is on, and not for float64, as autocast itself does."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
