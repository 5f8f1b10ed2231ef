"""Conversion between an engine's flat tensors and whole tensors per parameter.

Each ZeRO stage keeps AdamW's fp32 weights and moments in its own flat tensors, padding included. Checkpoints
need logical tensors, independent of those. All stages are described in the same terms: a flat tensor on each
rank of a group, and the runs of parameters that it holds.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.flat import Flat, Run

STATE = ("weight", "exp_avg", "exp_avg_sq")
BLOCK = 2**26  # elements gathered at once, in total


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


@torch.no_grad()
def gather_state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """STATE key -> parameter name -> whole fp32 tensor in host memory.

    Each parameter is on one rank of its data-parallel group.
    """
    whole: dict[str, dict[str, Tensor]] = {key: {} for key in STATE}
    for flat in engine.flats():
        mine = [name for i, name in enumerate(flat.members) if i % flat.size == flat.rank]
        for key in STATE:
            for name in mine:
                whole[key][name] = torch.empty(engine.shapes[name], dtype=torch.float32)
            values = _values(engine, flat, key)
            values = values if flat.order is None else flat.order.to_checkpoint(values)
            for start, gathered in _gathered(values, flat):
                for name in mine:
                    _copy_block(whole[key][name].view(-1), flat.members[name], start, gathered)
    return whole


def _gathered(mine: Tensor, flat: Flat) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, block) for blocks [ranks, elements] of all ranks' flat tensors, in host memory."""
    block = max(1, BLOCK // flat.size)
    for start in range(0, mine.numel(), block):
        local = mine[start : start + block].contiguous()
        if flat.size == 1:
            yield start, local.cpu().view(1, -1)
            continue
        gathered = local.new_empty(flat.size * local.numel())
        dist.all_gather_into_tensor(gathered, local, group=flat.group)
        yield start, gathered.view(flat.size, -1).cpu()


def _copy_block(target: Tensor, run_of: Callable[[int], Run], start: int, gathered: Tensor) -> None:
    """Copy a parameter's elements of a block into `target`, the whole parameter [elements]."""
    stop = start + gathered.shape[1]
    for rank, values in enumerate(gathered):
        run = run_of(rank)
        low, high = max(run.position, start), min(run.position + run.length, stop)
        if low < high:
            offset = run.start - run.position
            target[low + offset : high + offset] = values[low - start : high - start]


@torch.no_grad()
def scatter_state(engine: Engine, key: str, whole: dict[str, Tensor]) -> None:
    """Copy whole tensors of one STATE key, of every parameter on every rank, into the flat tensors.

    `finish_scatter` follows the last key.
    """
    for flat in engine.flats():
        values = _values(engine, flat, key)
        for name, run_of in flat.members.items():
            start, length, position = run_of(flat.rank)
            read = whole[name].view(-1)[start : start + length]
            values[position : position + length] = (
                read if flat.order is None else flat.order.from_checkpoint(read)
            )


@torch.no_grad()
def finish_scatter(engine: Engine, steps: int) -> None:
    """Set AdamW's number of updates, and copy its weights into the model."""
    for flat in engine.flats():
        _state_of(engine, flat)["step"] = _steps(flat, steps)
    engine.refresh_model()


def optimizer_steps(engine: Engine) -> int:
    """Number of updates that AdamW has made; its bias correction depends on it."""
    return int(_state_of(engine, next(engine.flats()))["step"])
