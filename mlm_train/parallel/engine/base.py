"""What an engine is: gradients in, updated weights out. Config field parallel.engine names one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mlm_train.config import Config, OptimizerConfig
from mlm_train.model.logical import pieces
from mlm_train.parallel.engine.flat import Flat, cut_evenly
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.nonfinite import nonfinite


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW groups: no decay on norms, on embedding and head as the config says."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_embedding = name.startswith(("embed_tokens", "lm_head"))
        decays = parameter.dim() > 1 and (config.decay_embeddings or not is_embedding)
        (decay if decays else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Engine(ABC):
    """The optimizer over data parallel, on every rank alike. Made as `Class(model, config, runtime)`.

    `entry` is what to call in the model's place. `optimizer`: an AdamW, whose state ("step", "exp_avg",
    "exp_avg_sq") checkpoints keep. `pieces` and `shapes` describe the model's parameters as they are before
    an engine cuts them.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, config: Config, runtime: Runtime) -> None:
        self.model, self.clip = model, config.optimizer.max_grad_norm
        self.entry = model
        self.pieces = list(pieces(model))
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    @abstractmethod
    def accumulating(self) -> AbstractContextManager[None]:
        """Backward passes inside add up; at the end their sum has been averaged over data parallel."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clip globally, update, drop the gradients; the gradient norm before clipping, of the whole model.

        Infinite where nothing was updated, since it was not finite; so it is on every rank then.
        """

    def nonfinite(self) -> list[str]:
        """Parameters whose gradient on this rank, not averaged yet, holds infinity or NaN.

        None where each pass is reduced at once: this rank's own gradients are gone then.
        """
        return nonfinite({name: p.grad for name, p in self.model.named_parameters() if p.grad is not None})

    def spoil(self) -> None:
        """Make the next step refuse the update, on all ranks: the norm of their gradients becomes NaN."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)

    def flats(self) -> Iterator[Flat]:
        """Every flat tensor of the optimizer, in an order that all ranks share: each parameter by itself."""
        for name, parameter in self.model.named_parameters():
            members = {name: cut_evenly(0, parameter.numel(), parameter.numel())}
            yield Flat(parameter.detach().view(-1), parameter, None, members)

    def refresh_model(self) -> None:  # noqa: B027 (of one that cuts nothing there is nothing to do)
        """Bring the model's weights up to the flat tensors, which were written to: here they are the same."""
