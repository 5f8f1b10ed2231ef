"""Parameters that may be sharded over data parallel, and their gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def owned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of modules marked `owned`: other ranks of the stage hold other ones, or other rows."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if getattr(module, "owned", False)
        for name, parameter in module.named_parameters(recurse=False)
    }


def reduce_gradients(parameters: Sequence[nn.Parameter], reduce: Callable[[Tensor], Tensor]) -> None:
    """Replace gradients by `reduce` of them all, flattened into one tensor; a missing one counts as zeros."""
    if not parameters:
        return
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(local(parameter.grad))
    reduced = reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, values in zip(gradients, reduced.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(values.view_as(gradient))
