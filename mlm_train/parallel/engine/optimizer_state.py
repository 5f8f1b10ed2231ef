"""ZeRO's flat partitions <-> whole tensors a parameter.

Each stage keeps AdamW's fp32 weights and moments in flat tensors of its own making, padding included.
Checkpoints want logical tensors that know nothing of that. All stages are described alike: a flat tensor on
each rank of a group, and where in it a rank holds which run of a parameter's elements.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.parallel.engine.deepspeed_zero import Engine

STATE = ("weight", "exp_avg", "exp_avg_sq")
BLOCK = 2**26  # elements gathered at once, of all ranks together


class _Run(NamedTuple):
    """Elements [start, start + length) of a parameter lie at `place` of a rank's flat tensor."""

    start: int
    length: int
    place: int


class _Flat(NamedTuple):
    """One of AdamW's flat fp32 tensors on this rank."""

    tensor: Tensor
    group: Any  # the ranks that hold the other parts; None: this one holds all
    members: dict[str, Callable[[int], _Run]]  # parameter name -> a rank of the group -> its run

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return 1 if self.group is None else dist.get_world_size(self.group)


def _flats(engine: Engine) -> Iterator[_Flat]:
    """Every flat tensor of the engine's optimizer, in an order that all ranks share."""
    zero, names = engine.zero.optimizer, engine.zero.param_names
    if engine.stage == 0:
        for name, parameter in engine.model.named_parameters():
            members = {name: _cut_evenly(0, parameter.numel(), parameter.numel())}
            yield _Flat(parameter.detach().view(-1), None, members)
    elif engine.stage < 3:
        for i, slice_ in enumerate(zero.single_partition_of_fp32_groups):
            places = zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True)
            members = {names[p]: _cut_anywhere(offset, p.numel(), slice_.numel()) for p, offset in places}
            yield _Flat(slice_, zero.real_dp_process_group[i], members)
    else:
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            members = {}
            for parameter in zero.fp16_groups[i]:
                _, place, part = zero.grad_position[zero.get_param_id(parameter)]
                members[names[parameter]] = _cut_evenly(place, parameter.ds_numel, part)
            yield _Flat(flat, zero.dp_process_group, members)


def _cut_anywhere(offset: int, numel: int, share: int) -> Callable[[int], _Run]:
    """Stages 1 and 2: parameters in a row, the row cut into shares."""

    def run(rank: int) -> _Run:
        low, high = max(rank * share, offset), min((rank + 1) * share, offset + numel)
        return _Run(low - offset, max(high - low, 0), low - rank * share)

    return run


def _cut_evenly(place: int, numel: int, part: int) -> Callable[[int], _Run]:
    """Stage 3: each parameter cut into parts, the last one padded. Stage 0: one part."""

    def run(rank: int) -> _Run:
        start = min(rank * part, numel)
        return _Run(start, min(part, numel - start), place)

    return run


def _state_of(engine: Engine, flat: _Flat) -> dict[str, Any]:
    """AdamW's state of a flat tensor; zeros before the first step."""
    optimizer = engine.zero.basic_optimizer
    owner = flat.tensor
    if engine.stage == 0:
        (name,) = flat.members
        owner = engine.model.get_parameter(name)
    state = optimizer.state[owner]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(owner)
        state["exp_avg_sq"] = torch.zeros_like(owner)
    return state


def _values(engine: Engine, flat: _Flat, key: str) -> Tensor:
    """The flat tensor itself for `weight`, else its moment."""
    return flat.tensor.detach() if key == "weight" else _state_of(engine, flat)[key].view(-1)


@torch.no_grad()
def gather_state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """STATE key -> parameter name -> whole fp32 tensor in host memory.

    The ranks of a data-parallel group share them out: each parameter is on one of them.
    """
    whole: dict[str, dict[str, Tensor]] = {key: {} for key in STATE}
    for flat in _flats(engine):
        mine = [name for i, name in enumerate(flat.members) if i % flat.size == flat.rank]
        for key in STATE:
            for name in mine:
                whole[key][name] = torch.empty(engine.shapes[name], dtype=torch.float32)
            for start, gathered in _gathered(_values(engine, flat, key), flat):
                for name in mine:
                    _copy_block(whole[key][name].view(-1), flat.members[name], start, gathered)
    return whole


def _gathered(mine: Tensor, flat: _Flat) -> Iterator[tuple[int, Tensor]]:
    """Block after block of all ranks' flat tensors [ranks, block] in host memory, with its start."""
    block = max(1, BLOCK // flat.size)
    for start in range(0, mine.numel(), block):
        part = mine[start : start + block].contiguous()
        if flat.size == 1:
            yield start, part.cpu().view(1, -1)
            continue
        gathered = part.new_empty(flat.size * part.numel())
        dist.all_gather_into_tensor(gathered, part, group=flat.group)
        yield start, gathered.view(flat.size, -1).cpu()


def _copy_block(target: Tensor, run_of: Callable[[int], _Run], start: int, gathered: Tensor) -> None:
    """Put what a block holds of a parameter into it."""
    stop = start + gathered.shape[1]
    for rank, values in enumerate(gathered):
        run = run_of(rank)
        low, high = max(run.place, start), min(run.place + run.length, stop)
        if low < high:
            offset = run.start - run.place
            target[low + offset : high + offset] = values[low - start : high - start]


@torch.no_grad()
def scatter_state(engine: Engine, key: str, whole: dict[str, Tensor]) -> None:
    """Put whole tensors of one STATE key, every parameter's on every rank, into the partitions.

    `finish_scatter` follows the last key.
    """
    for flat in _flats(engine):
        values = _values(engine, flat, key)
        for name, run_of in flat.members.items():
            start, length, place = run_of(flat.rank)
            values[place : place + length] = whole[name].view(-1)[start : start + length]


@torch.no_grad()
def finish_scatter(engine: Engine, steps: int) -> None:
    """Say how many updates AdamW has made, and put its weights into the model."""
    for flat in _flats(engine):
        _state_of(engine, flat)["step"] = torch.tensor(float(steps))
    _refresh_model(engine)


def _refresh_model(engine: Engine) -> None:
    """Bring the model's weights up to the optimizer's fp32 ones, as the end of a step does."""
    zero = engine.zero.optimizer
    if engine.stage in (1, 2):
        zero.update_lp_params()
    elif engine.stage == 3:
        zero._partition_all_parameters()
        for i in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def optimizer_steps(engine: Engine) -> int:
    """Updates AdamW has made (its bias correction counts them)."""
    return int(_state_of(engine, next(_flats(engine)))["step"])
