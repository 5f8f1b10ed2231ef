"""The process groups of a run: created once, held by one object."""

import functools
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mlm_train.config import Config
from mlm_train.parallel.mesh.topology import Topology


class CpuGroups(NamedTuple):
    """One axis's ranks, for tensors on the CPU: a group for the main thread, one for the data thread."""

    main: Any = None
    ahead: Any = None

    def of(self, ahead: bool) -> Any:
        """The group for plans of a later step, made by the data thread, or of the present one."""
        return self.ahead if ahead else self.main


NO_GROUPS = CpuGroups()


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's group along each axis, as torch.distributed's collectives take them.

    tensor: ranks that shard each layer. data: ranks with the same weights and other samples. pipeline: the
    stages of one replica. model: tensor x pipeline, the ranks of one replica. stage: data x tensor, the
    ranks of a pipeline stage; stage_cpu, data_cpu: for tensors on the CPU. embedding: first and last stage,
    for a tied head; None in between. control: all ranks, for small messages of one thread; None is
    torch's default group. What a config does not use (`used_axes`) is None too: each group takes a call of
    every rank, for each of its kind.
    """

    tensor: Any
    data: Any
    pipeline: Any
    model: Any = None
    embedding: Any = None
    stage: Any = None
    stage_cpu: CpuGroups = NO_GROUPS
    data_cpu: CpuGroups = NO_GROUPS
    control: Any = None

    def data_mesh(self, device: torch.device, topology: Topology, replicate: int) -> DeviceMesh:
        """The data-parallel ranks as FSDP takes them: [shard], or with `replicate` > 1 [replicate, shard].

        Neighbouring ranks, on one node, share a copy. Every rank calls it.
        """
        if replicate == 1:
            return DeviceMesh.from_group(self.data, device.type)
        lists = ranks_along(topology.world, topology.tensor, topology.pipeline)["data"]
        grids = torch.tensor(lists).unflatten(1, (replicate, -1))  # of each data-parallel group
        mine = next(grid for grid in grids if topology.rank in grid)
        groups = [_group(axis.flatten(0, 1).tolist()) for axis in (grids.mT, grids)]
        return DeviceMesh.from_group(groups, device.type, mesh=mine, mesh_dim_names=("replicate", "shard"))


def used_axes(config: Config) -> list[str]:
    """The axes, beside tensor, data and pipeline, whose groups this config uses."""
    owns = config.memory is not None and config.memory.owned
    tied, fsdp = config.model.tie_word_embeddings, config.parallel.engine == "fsdp"
    used = {
        "model": not fsdp,  # DeepSpeed's, and maybe that of a user's engine
        "embedding": tied and config.parallel.pipeline > 1,
        "stage": owns or (fsdp and not tied),  # owned FFN-M, and the embedding's rows
    }
    return [axis for axis, is_used in used.items() if is_used]


def create_groups(
    config: Config, topology: Topology, device: torch.device, timeout: timedelta
) -> ProcessGroups:
    """Create the groups of a layout over all ranks; every rank calls it.

    Those for the training device have this timeout, and serve again where a process starts the layout anew.
    """
    if topology.world == 1:
        alone = dist.group.WORLD
        both = CpuGroups(alone, alone)
        return ProcessGroups(alone, alone, alone, alone, alone, alone, both, both)
    layout = topology.world, topology.tensor, topology.pipeline
    axes = ["tensor", "data", "pipeline", *used_axes(config)]
    held = {axis: _on_device(*layout, axis, timeout) for axis in axes}
    on_cpu, shares = device.type == "cpu", config.memory is not None and config.memory.shared
    on_the_cpu = {"data_cpu": _on_cpu(topology, "data", held["data"] if on_cpu else None, ahead=shares)}
    if "stage" in held:
        on_the_cpu["stage_cpu"] = _on_cpu(topology, "stage", held["stage"] if on_cpu else None, ahead=True)
    return ProcessGroups(**held, **on_the_cpu)


@functools.cache
def _on_device(world: int, tensor: int, pipeline: int, axis: str, timeout: timedelta) -> Any:
    """This rank's group of an axis, for the training device."""
    return _group(ranks_along(world, tensor, pipeline)[axis], timeout=timeout)


def ranks_along(world: int, tensor: int, pipeline: int) -> dict[str, list[list[int]]]:
    """The ranks of all groups of each axis, in megatron-core's order."""
    grid = torch.arange(world).view(pipeline, -1, tensor)
    along_pipeline = grid.movedim(0, -1).flatten(0, 1)
    found = {
        "tensor": grid.flatten(0, 1),
        "data": grid.movedim(1, -1).flatten(0, 1),
        "pipeline": along_pipeline,
        "model": grid.movedim(1, 0).flatten(1),
        "embedding": along_pipeline[:, [0, -1]] if pipeline > 1 else along_pipeline,
        "stage": grid.flatten(1),
    }
    return {axis: lists.tolist() for axis, lists in found.items()}


def _group(lists: list[list[int]], backend: str | None = None, timeout: timedelta | None = None) -> Any:
    """This rank's group among `lists`, which every rank creates; None if it is in none of them."""
    return dist.new_subgroups_by_enumeration(lists, timeout=timeout, backend=backend)[0]


def _on_cpu(topology: Topology, axis: Literal["stage", "data"], main: Any, ahead: bool) -> CpuGroups:
    """This rank's stage or data-parallel group for tensors on the CPU; `main`: where there is one already.

    ahead: whether the data thread needs one.
    """
    lists = ranks_along(topology.world, topology.tensor, topology.pipeline)[axis]
    backend = None if dist.get_backend() == "fake" else "gloo"
    return CpuGroups(main or _group(lists, backend), _group(lists, backend) if ahead else None)


def forget_groups() -> None:
    """Forget the groups, when torch has destroyed all of them."""
    _on_device.cache_clear()


def deepspeed_mpu(groups: ProcessGroups, topology: Topology) -> SimpleNamespace:
    """The `mpu` object from which DeepSpeed gets process groups.

    Its model-parallel group must span tensor and pipeline: DeepSpeed sums the gradient norm over it.
    """
    axes = {
        "data_parallel": (groups.data, topology.data, topology.data_rank),
        "model_parallel": (
            groups.model,
            topology.tensor * topology.pipeline,
            topology.pipeline_rank * topology.tensor + topology.tensor_rank,
        ),
        "tensor_model_parallel": (groups.tensor, topology.tensor, topology.tensor_rank),
        "pipeline_model_parallel": (groups.pipeline, topology.pipeline, topology.pipeline_rank),
    }
    mpu = SimpleNamespace()
    for axis, (group, size, rank) in axes.items():
        setattr(mpu, f"get_{axis}_group", lambda *_, group=group, **__: group)
        setattr(mpu, f"get_{axis}_world_size", lambda *_, size=size, **__: size)
        setattr(mpu, f"get_{axis}_rank", lambda *_, rank=rank, **__: rank)
    return mpu
