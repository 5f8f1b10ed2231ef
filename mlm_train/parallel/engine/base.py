"""The interface of engines: gradients in, updated weights out. Config field parallel.engine names one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mlm_train.config import Config, OptimizerConfig
from mlm_train.model.logical import Target, pieces, targets
from mlm_train.parallel.engine.flat import Flat, Run
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.nonfinite import nonfinite


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW parameter groups: no decay of norms, nor of embedding and head without decay_embeddings."""
    return grouped(model.named_parameters(), config)


def grouped(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """The same of parameters with the model's names."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in parameters:
        is_embedding = name.startswith(("embed_tokens", "lm_head"))
        decays = parameter.dim() > 1 and (config.decay_embeddings or not is_embedding)
        (decay if decays else no_decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Engine(ABC):
    """The optimizer with data parallelism, equal on all ranks: `Class(model, config, runtime, roots)`.

    `roots`: the modules that a step calls, the model or its pipeline stages. `entry`: the module to call
    instead of the model. `optimizer`: an AdamW, whose state ("step", "exp_avg",
    "exp_avg_sq") is saved in checkpoints. `pieces` and `shapes` describe the tensors of `flats`: those of the
    model's parameters before the engine shards them, unless it keeps a rank's rows of them as tensors.
    `counted`: the parameters that this rank counts in the gradient norm and writes to checkpoints. Of a copy
    on another pipeline stage or tensor-parallel rank, one is counted (build_model).
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self, model: nn.Module, config: Config, runtime: Runtime, roots: Sequence[nn.Module]
    ) -> None:
        self.model, self.clip = model, config.optimizer.max_grad_norm
        self.entry = model
        self.pieces = list(pieces(model))
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.counted = {name for name, parameter in model.named_parameters() if _is_counted(parameter)}
        self.found: list[str] = []
        topology = runtime.topology
        self.replicas: Any = runtime.groups.data if topology.data > 1 else None  # of `flats` below

    @abstractmethod
    def accumulating(self) -> AbstractContextManager[None]:
        """Accumulate gradients of the passes inside; at the end, average their sum over data parallel."""

    @abstractmethod
    def step(self, lr: float) -> float | Tensor:
        """Clip, update, drop the gradients; return the whole model's gradient norm before clipping.

        The norm is infinite, on every rank, where it was non-finite and nothing was updated. It may be a
        scalar on the device, so that nothing waits for it here.
        """

    def before_pass(self, last: bool) -> None:  # noqa: B027 (empty where nothing is reduced in passes)
        """Called before each micro-batch's forward without a pipeline; `last`: the step's last one."""

    def targets(self) -> Iterator[Target]:
        """Yield this rank's pieces of the weights with the tensors that hold them."""
        return targets(self.model)

    def fill(self, fill: Callable[[Iterable[Target]], None]) -> None:
        """Have `fill` write the weights of this rank; `refresh_model` follows on all ranks."""
        fill(self.targets())

    def inspect(self, loss: Tensor) -> None:
        """After a step's passes, before gradients are averaged: note non-finite ones of this rank.

        loss: this rank's sum, a scalar; with a non-finite one no rank updates.
        """
        self.found = nonfinite({n: p.grad for n, p in self.model.named_parameters() if p.grad is not None})
        if not loss.isfinite():
            self.spoil()

    def nonfinite(self) -> Callable[[], list[str]]:
        """A function that returns which gradients on this rank, before averaging, were non-finite, by name.

        It is called after a step, its result perhaps after later steps. Empty where gradients are reduced in
        each pass: this rank's own ones are not available then.
        """
        found = self.found
        return lambda: found

    def spoil(self) -> None:
        """Set this rank's gradients to NaN, so that the next step skips the update on all ranks."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)

    def flats(self) -> Iterator[Flat]:
        """Yield the flat tensors of the optimizer, in one order on all ranks; here one per parameter.

        Each data-parallel rank holds all of them.
        """
        for name, parameter in self.model.named_parameters():
            members = {name: Run(0, parameter.numel(), 0)}
            yield Flat(parameter.detach().view(-1), parameter, members, replicas=self.replicas)

    def refresh_model(self) -> None:  # noqa: B027 (empty without sharding)
        """Update the model's weights from flat tensors that were written to; by default they are the same."""


def _is_counted(parameter: nn.Parameter) -> bool:
    """Whether a parameter is neither another stage's nor another tensor-parallel rank's (build_model)."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    tensor_sharded = getattr(parameter, "tensor_model_parallel", False)
    return bool(tensor_sharded or getattr(parameter, "model_parallel", True))
