"""The matrix-vector product of a decoded token, for eager and compiled layers on a CPU."""

import torch
from torch import Tensor


def matvec(weight: Tensor, x: Tensor) -> Tensor:
    """weight [out, in], x [in] -> [out]. No gradients."""
    if torch.compiler.is_compiling():
        product: Tensor = _whole(weight, x)
        return product
    return torch.mv(weight, x)


@torch.library.custom_op("mlm_train::matvec", mutates_args=())
def _whole(weight: Tensor, x: Tensor) -> Tensor:
    """torch.mv as it is: the compiler would generate a loop of its own, which reads weights more slowly."""
    return torch.mv(weight, x)


@_whole.register_fake
def _(weight: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(weight.shape[0])
