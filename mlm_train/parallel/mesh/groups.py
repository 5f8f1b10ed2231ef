"""The process groups of a run: created once by megatron-core, held by one object.

No other module of the package asks megatron-core for one.
"""

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

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
    torch's default group.
    """

    tensor: Any
    data: Any
    pipeline: Any
    model: Any
    embedding: Any
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
        mesh, groups = torch.empty(0), []
        world = torch.arange(topology.world).view(topology.pipeline, topology.data, topology.tensor)
        for ranks in world.movedim(1, -1).reshape(-1, topology.data):
            grid = ranks.view(replicate, -1)
            copies = [dist.new_group(column.tolist()) for column in grid.T]  # every rank creates every group
            shards = [dist.new_group(row.tolist()) for row in grid]
            for row, column in (grid == topology.rank).nonzero().tolist():
                mesh, groups = grid, [copies[column], shards[row]]
        return DeviceMesh.from_group(groups, device.type, mesh=mesh, mesh_dim_names=("replicate", "shard"))


def create_groups(topology: Topology, device: torch.device) -> ProcessGroups:
    """Create the groups of a layout over all ranks; every rank calls it.

    Groups of another layout that this process holds are destroyed first. One rank needs no megatron-core.
    """
    if topology.world == 1:
        alone = dist.group.WORLD
        both = CpuGroups(alone, alone)
        return ProcessGroups(alone, alone, alone, alone, alone, alone, both, both)
    from megatron.core import parallel_state as state

    if state.model_parallel_is_initialized():
        sizes = (state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size())
        if sizes != (topology.tensor, topology.pipeline):
            state.destroy_model_parallel()
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel(topology.tensor, topology.pipeline, create_gloo_process_groups=False)
    data = state.get_data_parallel_group()
    stage = state.get_tensor_and_data_parallel_group()
    return ProcessGroups(
        tensor=state.get_tensor_model_parallel_group(),
        data=data,
        pipeline=state.get_pipeline_model_parallel_group(),
        model=state.get_model_parallel_group(),
        embedding=state.get_embedding_group(check_initialized=False),
        stage=stage,
        stage_cpu=_on_cpu(topology, "stage", stage if device.type == "cpu" else None),
        data_cpu=_on_cpu(topology, "data", data if device.type == "cpu" else None),
    )


def _on_cpu(topology: Topology, axes: Literal["stage", "data"], main: Any) -> CpuGroups:
    """This rank's stage or data-parallel group for tensors on the CPU; `main`: where there is one already."""
    return CpuGroups(main or _gloo_group(topology, axes), _gloo_group(topology, axes))


def _gloo_group(topology: Topology, axes: Literal["stage", "data"]) -> Any:
    world = torch.arange(topology.world).view(topology.pipeline, topology.data, topology.tensor)
    lists = world.flatten(1) if axes == "stage" else world.movedim(1, -1).flatten(0, 1)
    backend = None if dist.get_backend() == "fake" else "gloo"
    groups: dict[int, Any] = {}
    for ranks in lists.tolist():  # every rank creates every group
        group = dist.new_group(ranks, backend=backend)
        groups |= dict.fromkeys(ranks, group)
    return groups[topology.rank]


def destroy_groups() -> None:
    """Destroy the groups, if there are any."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and state.model_parallel_is_initialized():
        state.destroy_model_parallel()


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
