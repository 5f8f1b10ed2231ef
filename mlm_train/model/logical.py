"""Logical tensors: weights by name and shape, independent of how the running model stores them.

Parameters may be fused (q, k and v in one weight) and may hold a shard of a tensor only (parallel/ shards
them, with padding). Initialisation, checkpoints, exports and parity tests use the whole, unfused tensors by
their export names (`model.layers.0.self_attn.q_proj.weight`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Part(NamedTuple):
    """A range of a module's weight along one dimension, and its position in a logical tensor."""

    name: str | None  # of the logical tensor's module, a sibling of this one; None: this module's own name
    dim: int
    start: int  # first index in the weight
    length: int  # indices without the padding that may follow
    offset: int  # first index in the logical tensor
    total: int  # size of the logical tensor along dim


@runtime_checkable
class HasParts(Protocol):
    """A module whose weight is not exactly one whole logical tensor."""

    def logical_parts(self) -> list[Part]:
        """The parts of `weight`, in order."""
        ...


class Piece(NamedTuple):
    """The slice of one logical tensor that a parameter holds."""

    name: str
    parameter: str
    local: tuple[slice, ...]  # its indices in the parameter
    offset: tuple[int, ...]  # of its first element in the logical tensor
    shape: torch.Size  # of the whole logical tensor

    def of(self, whole: Tensor) -> Tensor:
        """The piece as a view of the parameter, or of a tensor of its shape (gradient, moment)."""
        return whole[self.local]

    def cut(self, logical: Tensor) -> Tensor:
        """The same piece as a view of the whole logical tensor."""
        lengths = (span.stop - span.start for span in self.local)
        return logical[tuple(slice(o, o + n) for o, n in zip(self.offset, lengths, strict=True))]

    def within(self, start: int, stop: int) -> "Piece | None":
        """What of the piece is in rows [start, stop) of the parameter, with indices in those rows alone."""
        rows = self.local[0]
        low, high = max(rows.start, start), min(rows.stop, stop)
        if low >= high:
            return None
        local = (slice(low - start, high - start), *self.local[1:])
        offset = (self.offset[0] + low - rows.start, *self.offset[1:])
        return self._replace(local=local, offset=offset)

    def overlap(self, rectangle: Sequence[slice]) -> tuple[tuple[slice, ...], tuple[int, ...]] | None:
        """What of the piece is in a rectangle of the parameter; None: nothing.

        Returns its indices in the rectangle, and the offset of its first element in the logical tensor.
        """
        spans = [
            (max(held.start, wanted.start), min(held.stop, wanted.stop))
            for held, wanted in zip(self.local, rectangle, strict=True)
        ]
        if any(low >= high for low, high in spans):
            return None
        starts = [wanted.start for wanted in rectangle]
        inside = tuple(
            slice(low - start, high - start) for (low, high), start in zip(spans, starts, strict=True)
        )
        offset = tuple(
            first + low - held.start
            for first, (low, _), held in zip(self.offset, spans, self.local, strict=True)
        )
        return inside, offset


class LogicalSlice(NamedTuple):
    """A rectangle of a logical tensor, as a checkpoint's parts are."""

    name: str
    shape: torch.Size  # of the whole logical tensor
    offset: tuple[int, ...]  # of its first element there
    tensor: Tensor  # its elements


class Target(NamedTuple):
    """A tensor to read a piece into: a parameter, a shard of one, or a tensor of its shape."""

    piece: Piece
    tensor: Tensor

    @property
    def view(self) -> Tensor:
        """The piece's elements."""
        return self.piece.of(self.tensor)


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Yield every piece of a logical tensor that a Transformer holds, in the order of its parameters."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = modules[owner_name]
        rows = parameter.shape[0]
        parts = owner.logical_parts() if isinstance(owner, HasParts) else [Part(None, 0, 0, rows, 0, rows)]
        for part in parts:
            if not part.length:
                continue
            prefix = owner_name if part.name is None else f"{owner_name.rpartition('.')[0]}.{part.name}"
            local = [slice(0, size) for size in parameter.shape]
            local[part.dim] = slice(part.start, part.start + part.length)
            offset, shape = [0] * parameter.dim(), list(parameter.shape)
            offset[part.dim], shape[part.dim] = part.offset, part.total
            yield Piece(
                _export_name(f"{prefix}.{leaf}"), name, tuple(local), tuple(offset), torch.Size(shape)
            )


def _export_name(name: str) -> str:
    """Llama's names: everything but the head is under `model.`."""
    return name if name.startswith("lm_head") else f"model.{name}"


def targets(model: nn.Module) -> Iterator[Target]:
    """Yield every piece of a Transformer with the parameter that holds it."""
    parameters = dict(model.named_parameters())
    for piece in pieces(model):
        yield Target(piece, parameters[piece.parameter].detach())


def named_pieces(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the export name of every weight, with a view of the piece that a Transformer holds."""
    for target in targets(model):
        yield target.piece.name, target.view
