"""AdamW's weights and moments on this rank as rectangles of logical tensors.

Each engine keeps them in its own flat tensors, padding included, and checkpoints hold logical tensors. A run
of a parameter in a flat tensor is a few rectangles of it, and these are rectangles of logical tensors: a rank
copies and reads its own ones, whatever ranks hold the others.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.model.logical import LogicalSlice, Piece
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.flat import Flat, Run, Share, rectangles, shares
from mlm_train.utils.host_copy import copy_to_host

STATE = ("weight", "exp_avg", "exp_avg_sq")


def _state_of(engine: Engine, flat: Flat) -> dict[str, Any]:
    """AdamW's state of a flat tensor; zeros before the first step."""
    state: dict[str, Any] = engine.optimizer.state[flat.owner]
    if "exp_avg" not in state:
        state["step"] = _steps(flat, 0)
        state["exp_avg"] = torch.zeros_like(flat.owner)
        state["exp_avg_sq"] = torch.zeros_like(flat.owner)
    return state


def _steps(flat: Flat, steps: int) -> Tensor:
    """AdamW's number of updates, where its fused kernel reads it: on the weights' device."""
    return torch.tensor(float(steps), device=flat.owner.device)


def _values(engine: Engine, flat: Flat, key: str) -> Tensor:
    """The flat tensor itself for `weight`, else its moment."""
    return flat.tensor.detach() if key == "weight" else _state_of(engine, flat)[key].view(-1)


class _Logical:
    """The logical tensors that an engine's parameters are made of."""

    def __init__(self, engine: Engine) -> None:
        self.shapes = engine.shapes
        self.pieces: dict[str, list[Piece]] = {}
        for piece in engine.pieces:
            self.pieces.setdefault(piece.parameter, []).append(piece)

    def slices(self, runs: Mapping[str, Run], key: str, values: Tensor, low: int) -> Iterator[LogicalSlice]:
        """The rectangles of logical tensors in `values`, a flat tensor's elements from `low` on, as views.

        runs: by parameter, of the flat tensor.
        """
        for name, run in runs.items():
            start, stop = max(run.position, low), min(run.position + run.length, low + len(values))
            if start >= stop:
                continue
            shift = run.start - run.position
            held, position = values[start - low : stop - low], 0
            for rectangle in rectangles(self.shapes[name], start + shift, stop + shift):
                sizes = [span.stop - span.start for span in rectangle]
                block = held[position : position + math.prod(sizes)].view(sizes)
                position += block.numel()
                for piece in self.pieces.get(name, ()):
                    if (found := piece.overlap(rectangle)) is not None:
                        where, offset = found
                        yield LogicalSlice(f"{key}/{piece.name}", piece.shape, offset, block[where])


@torch.no_grad()
def copy_state(engine: Engine, room: list[Tensor] | None = None) -> list[LogicalSlice]:
    """Copies, in host memory, of the state that this rank writes to a checkpoint, by `STATE key/tensor`.

    Every rank calls it. Of what several ranks hold, one has it, as in the gradient norm (Engine.counted).
    room: memory to use again; see copy_to_host.
    """
    writes = (flat for flat in engine.flats() if engine.counted & flat.members.keys())
    places = [(share.flat, key, share.mine) for share in shares(writes) for key in STATE]

    def stored() -> Iterator[Tensor]:
        for flat, key, (low, high) in places:
            values = _values(engine, flat, key)
            values = values if flat.order is None else flat.order.to_checkpoint(values)
            yield values[low:high]

    logical, copied = _Logical(engine), list[LogicalSlice]()
    for (flat, key, (low, _)), values in zip(places, copy_to_host(stored(), room), strict=True):
        counted = {name: run for name, run in flat.members.items() if name in engine.counted}
        copied += logical.slices(counted, key, values, low)
    return copied


class Restored:
    """State to be read from a checkpoint: fill `slices`, then `finish`. Every rank does both.

    keys: of STATE. All else in the flat tensors, which is padding, becomes zero.
    """

    @torch.no_grad()
    def __init__(self, engine: Engine, keys: Sequence[str]) -> None:
        self.engine, logical = engine, _Logical(engine)
        self.parts: list[tuple[Share, Tensor, Tensor]] = []
        self.slices: list[LogicalSlice] = []
        for share in shares(engine.flats()):
            for key in keys:
                values = _values(engine, share.flat, key)
                stored = values if share.flat.order is None else torch.zeros_like(values)
                low, high = share.mine
                found = list(logical.slices(share.flat.members, key, stored[low:high], low))
                if sum(part.tensor.numel() for part in found) < high - low:
                    stored[low:high].zero_()
                self.slices += found
                self.parts.append((share, values, stored))

    @torch.no_grad()
    def finish(self) -> None:
        """Pass on what was read for several ranks, and update the model's weights."""
        for (flat, cuts), values, stored in self.parts:
            if flat.order is not None:
                values.copy_(flat.order.from_checkpoint(stored))
            if flat.replicas is not None:
                for rank in range(len(cuts) - 1):
                    if cuts[rank] < cuts[rank + 1]:
                        part = values[cuts[rank] : cuts[rank + 1]]
                        dist.broadcast(part, group=flat.replicas, group_src=rank)
        self.engine.refresh_model()


@torch.no_grad()
def scatter_weights(engine: Engine, whole: dict[str, Tensor]) -> None:
    """Copy this rank's elements of whole weights, of every parameter, into the flat tensors."""
    for flat in engine.flats():
        for name, (start, length, position) in flat.members.items():
            flat.tensor.detach()[position : position + length] = whole[name].view(-1)[start : start + length]


def optimizer_steps(engine: Engine) -> int:
    """Number of updates that AdamW has made; its bias correction depends on it."""
    return int(_state_of(engine, next(engine.flats()))["step"])


def set_optimizer_steps(engine: Engine, steps: int) -> None:
    """Set AdamW's number of updates."""
    for flat in engine.flats():
        _state_of(engine, flat)["step"] = _steps(flat, steps)
