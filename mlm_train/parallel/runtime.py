"""The processes of a run: rank and device, process groups, the few collectives of the loop."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.config import Config
from mlm_train.errors import SharedUserError, UserError
from mlm_train.parallel.topology import Topology

Result = TypeVar("Result")


def world_size() -> int:
    """Processes of this launch, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_rank() -> int:
    """This process among them."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Runtime:
    """What a rank knows of the others."""

    topology: Topology
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all: prints, writes TensorBoard and manifests."""
        return self.topology.rank == 0

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over data parallel, on every rank."""
        from megatron.core import parallel_state

        values = values.clone()
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def everywhere(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the leading rank; its result, or its UserError, on every rank."""
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise SharedUserError(outcome[1])
        return outcome[0]


def pick_device(choice: str) -> torch.device:
    """The device of config field train.device on this rank."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: torch finds no CUDA device here; set train.device=cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start(config: Config) -> Runtime:
    """Join the other ranks: gloo on CPU, NCCL on CUDA, megatron-core's groups over them."""
    topology = Topology.of(config.parallel, world_size(), global_rank())
    topology.check_batch(config)
    device = pick_device(config.train.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.parallel.timeout)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(topology.tensor, topology.pipeline)
    return Runtime(topology, device)


def stop() -> None:
    """Leave the groups."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
