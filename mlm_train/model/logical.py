"""Logical tensors: the names and shapes that the world outside the running model knows.

Parameters may be fused (q, k and v in one weight). Initialisation, checkpoints, exports and parity
tests speak of the unfused tensors by their export names (`model.layers.0.self_attn.q_proj.weight`).
"""

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlm_train.config import ModelConfig
from mlm_train.model.linear import FusedLinear


class Piece(NamedTuple):
    """Rows [start, stop) of a parameter that make one logical tensor."""

    name: str
    parameter: str
    start: int
    stop: int

    def of(self, whole: Tensor) -> Tensor:
        """The piece as a view of the parameter, or of a tensor of its shape (a gradient, a moment)."""
        return whole[self.start : self.stop]


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Every logical tensor of a Transformer, in the order of its parameters."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = modules[owner_name]
        if not isinstance(owner, FusedLinear):
            yield Piece(_export_name(name), name, 0, parameter.shape[0])
            continue
        prefix = owner_name.rpartition(".")[0]
        start = 0
        for part, rows in owner.parts.items():
            yield Piece(_export_name(f"{prefix}.{part}.{leaf}"), name, start, start + rows)
            start += rows


def _export_name(name: str) -> str:
    """Llama's names: everything but the head stands below `model.`."""
    return name if name.startswith("lm_head") else f"model.{name}"


def named_pieces(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Export name -> view of the weight that a Transformer holds."""
    parameters = dict(model.named_parameters())
    for piece in pieces(model):
        yield piece.name, piece.of(parameters[piece.parameter].detach())


def draw(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> Tensor:
    """The initial value of a logical tensor; it depends on seed and name only, never on the layout.

    Norms are 1; products that write to the residual stream have std / sqrt(2 * layers).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = config.init_std
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.num_hidden_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill a Transformer's weights in place, tensor by tensor."""
    for name, weight in named_pieces(model):
        weight.copy_(draw(config, seed, name, weight.shape))
