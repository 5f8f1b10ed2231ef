"""ZeRO-1's flat partitions <-> whole tensors a parameter, on every data-parallel rank.

DeepSpeed flattens each parameter group and gives each rank a slice, padding included. Checkpoints
want logical tensors that know nothing of that.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.parallel.engine import Engine

STATE = ("weight", "exp_avg", "exp_avg_sq")


def _groups(zero: Any) -> Iterator[tuple[Tensor, list[tuple[str, Tensor, int]], Any]]:
    """Per group: this rank's fp32 slice, (name, parameter, offset in the flat group), its ranks."""
    names = zero.param_names
    for i, slice_ in enumerate(zero.single_partition_of_fp32_groups):
        members = zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True)
        yield slice_, [(names[p], p, offset) for p, offset in members], zero.real_dp_process_group[i]


def _moment(zero: Any, slice_: Tensor, key: str) -> Tensor:
    """The slice itself for `weight`, else AdamW's state of it (zeros before the first step)."""
    if key == "weight":
        return slice_.detach()
    state = zero.optimizer.state[slice_]
    if key not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(slice_)
        state["exp_avg_sq"] = torch.zeros_like(slice_)
    return state[key]


def gather_state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """STATE key -> parameter name -> whole fp32 tensor in host memory; one all-gather per group and key."""
    zero = engine.zero.optimizer
    whole: dict[str, dict[str, Tensor]] = {key: {} for key in STATE}
    for slice_, members, group in _groups(zero):
        for key in STATE:
            mine = _moment(zero, slice_, key)
            flat = mine.new_empty(mine.numel() * dist.get_world_size(group))
            dist.all_gather_into_tensor(flat, mine.contiguous(), group=group)
            flat = flat.cpu()  # a device has no room for all of it
            for name, parameter, offset in members:
                whole[key][name] = flat[offset : offset + parameter.numel()].view(parameter.shape)
    return whole


def scatter_state(engine: Engine, whole: dict[str, dict[str, Tensor]], step: int) -> None:
    """Put whole tensors (as gather_state gives) into the partitions and the model's weights."""
    zero = engine.zero.optimizer
    for slice_, members, group in _groups(zero):
        start = dist.get_rank(group) * slice_.numel()
        for key in STATE:
            target = _moment(zero, slice_, key)
            for name, parameter, offset in members:
                _copy_overlap(target, start, whole[key][name].reshape(-1), offset)
                if key == "weight":
                    parameter.data.copy_(whole[key][name])
        zero.optimizer.state[slice_]["step"] = torch.tensor(float(step))


def optimizer_steps(engine: Engine) -> int:
    """Updates AdamW has made (its bias correction counts them)."""
    zero = engine.zero.optimizer
    slice_ = zero.single_partition_of_fp32_groups[0]
    return int(zero.optimizer.state[slice_].get("step", 0))


def _copy_overlap(target: Tensor, start: int, source: Tensor, offset: int) -> None:
    """Copy what of `source` (at `offset` of the flat group) lies in `target` (from `start`)."""
    low, high = max(start, offset), min(start + target.numel(), offset + source.numel())
    if low < high:
        target[low - start : high - start].copy_(source[low - offset : high - offset])
