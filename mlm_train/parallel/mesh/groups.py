"""The process groups of a run: created once by megatron-core, held by one object.

No other module of the package asks megatron-core for one.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mlm_train.parallel.mesh.topology import Topology


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's group along each axis, as torch.distributed's collectives take them.

    tensor: ranks that shard each layer. data: ranks with the same weights and other samples. pipeline: the
    stages of one replica. model: tensor x pipeline, the ranks of one replica. embedding: first and last
    stage, for a tied head; None in between. control: all ranks, for small messages of one thread; None is
    torch's default group.
    """

    tensor: Any
    data: Any
    pipeline: Any
    model: Any
    embedding: Any
    control: Any = None


def create_groups(topology: Topology) -> ProcessGroups:
    """Create the groups of a layout over all ranks; every rank calls it.

    Groups of another layout that this process holds are destroyed first.
    """
    from megatron.core import parallel_state as state

    if state.model_parallel_is_initialized():
        sizes = (state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size())
        if sizes != (topology.tensor, topology.pipeline):
            state.destroy_model_parallel()
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel(topology.tensor, topology.pipeline)
    return ProcessGroups(
        tensor=state.get_tensor_model_parallel_group(),
        data=state.get_data_parallel_group(),
        pipeline=state.get_pipeline_model_parallel_group(),
        model=state.get_model_parallel_group(),
        embedding=state.get_embedding_group(check_initialized=False),
    )


def destroy_groups() -> None:
    """Destroy the groups, if there are any."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


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
