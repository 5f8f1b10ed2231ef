"""Find non-finite values in one pass over the tensors."""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor
from torch.nn.utils import get_total_norm

Name = TypeVar("Name")


def nonfinite(tensors: Mapping[Name, Tensor]) -> list[Name]:
    """Names of the tensors that hold infinity or NaN."""
    if get_total_norm(tensors.values()).isfinite():
        return []
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
