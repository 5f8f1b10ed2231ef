"""The processes of a run: rank and device, process groups, the few collectives of the loop."""

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from mlm_train.config import Config, ParallelConfig, TrainConfig
from mlm_train.config.parallel import ZERO_BUBBLE
from mlm_train.errors import PeerFailure, SharedUserError, UserError
from mlm_train.parallel.health.failures import one_line
from mlm_train.parallel.health.progress_marker import ProgressMarker
from mlm_train.parallel.health.thread_stacks import keep_flight_records
from mlm_train.parallel.mesh.groups import ProcessGroups, create_groups, destroy_groups
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.utils.files import told
from mlm_train.utils.malloc import keep_freed

Result = TypeVar("Result")
ZERO_BUBBLE_TORCH = (2, 13)  # older ones do not run zero-bubble schedules over our stages
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def world_size() -> int:
    """Processes of this launch, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def global_rank() -> int:
    """This process among them."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Runtime:
    """What a rank knows of the others."""

    topology: Topology
    device: torch.device
    groups: ProcessGroups
    marker: ProgressMarker = field(default_factory=ProgressMarker)  # where this rank is, for the watchdog

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank speaks for all: prints, writes TensorBoard and manifests."""
        return self.topology.rank == 0

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over data parallel, on every rank."""
        values = values.clone()
        dist.all_reduce(values, group=self.groups.data)
        return values

    def sum_over_all(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over all ranks, on every rank."""
        values = values.clone()
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(self.groups.control)

    def for_thread(self, timeout: float) -> "Runtime":
        """The same ranks for another thread, with a group and a mark of its own; every rank calls it."""
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        return replace(self, marker=ProgressMarker(), groups=replace(self.groups, control=group))

    def broadcast(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the leading rank; its result, or its failure, on every rank."""
        outcome, error = _attempt(work) if self.is_rank_0 else (None, None)
        outcomes = [outcome]
        dist.broadcast_object_list(outcomes, src=0, group=self.groups.control)
        if error is not None:
            raise error
        assert outcomes[0] is not None
        return outcomes[0].result()

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """Run `work` on every rank; all results in the order of ranks, or the first failure, on each."""
        outcomes: list[Any] = [None] * self.topology.world
        outcome, error = _attempt(work)
        dist.all_gather_object(outcomes, outcome, group=self.groups.control)
        if error is not None:
            raise error
        return [outcome.result() for outcome in outcomes]


@dataclass(frozen=True)
class _Outcome:
    """What a rank's work came to, in a form that travels."""

    value: Any = None
    user_error: str | None = None
    failure: str | None = None

    def result(self) -> Any:
        """The value; or the failure, raised on every rank alike, so that none waits for another."""
        if self.user_error is not None:
            raise SharedUserError(self.user_error)
        if self.failure is not None:
            raise PeerFailure(self.failure)
        return self.value


def _attempt(work: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
    """The outcome for all ranks, and a failure that this rank is to raise itself, with its traceback."""
    try:
        return _Outcome(work()), None
    except UserError as error:
        return _Outcome(user_error=str(error)), None
    except OSError as error:
        return _Outcome(user_error=f"{error.filename or 'a file'}: {told(error)}"), None
    except Exception as error:
        line = f"stopped, because rank {global_rank()} failed first: {one_line(error)}"
        return _Outcome(failure=line), error


def check_device(choice: str, local_processes: int) -> None:
    """UserError where this machine lacks the devices that config field train.device asks for."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: torch finds no CUDA device here; set train.device=cpu")
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if choice == "auto" and given != "0" and not torch.cuda.is_available():
        raise UserError(
            f"this Slurm job was given {given} GPUs here and torch finds none: look at `nvidia-smi` on "
            f"{socket.gethostname()}, or set train.device=cpu"
        )
    devices = torch.cuda.device_count()
    if choice != "cpu" and 0 < devices < local_processes:
        raise UserError(f"{local_processes} processes here, but {devices} CUDA devices: start fewer")


def check_compiler(train: TrainConfig) -> None:
    """UserError where torch.compile, which writes C++ for a CPU, would find no compiler."""
    compiler = os.environ.get("CXX", "g++")
    on_cpu = train.device == "cpu" or not torch.cuda.is_available()
    if train.compile and on_cpu and shutil.which(compiler) is None:
        raise UserError(
            f"train.compile=True: needs a C++ compiler, and {compiler} is not on the PATH: install it, name "
            "another in CXX, or leave train.compile out"
        )


def has_zero_bubble() -> bool:
    """Whether this torch's zero-bubble schedules run our stages."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= ZERO_BUBBLE_TORCH


def check_torch(parallel: ParallelConfig) -> None:
    """UserError where the schedule needs a newer torch than this one."""
    if parallel.pipeline > 1 and parallel.order in ZERO_BUBBLE and not has_zero_bubble():
        needed = ".".join(map(str, ZERO_BUBBLE_TORCH))
        raise UserError(
            f"parallel.pipeline_schedule={parallel.order}: needs torch {needed} or newer, and this is torch "
            f"{torch.__version__}: set parallel.pipeline_schedule=1f1b, or install a newer torch"
        )


def pick_device(choice: str) -> torch.device:
    """The device of config field train.device on this rank: auto takes CUDA where it is."""
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start(config: Config) -> Runtime:
    """Join the other ranks: gloo on CPU, NCCL on CUDA, megatron-core's groups over them."""
    topology = Topology.of(config.parallel, world_size(), global_rank())
    topology.check_batch(config)
    check_torch(config.parallel)
    _make_repeatable(config.train)
    device = pick_device(config.train.device)
    if device.type == "cpu":
        keep_freed()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.parallel.timeout)
    if not dist.is_initialized():
        keep_flight_records()
        if world_size() == local_world_size():
            _stay_on_loopback()
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Runtime(topology, device, create_groups(topology), ProgressMarker(device))


def _loopback() -> str | None:
    """The name of this machine's loopback interface."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(at.address == "127.0.0.1" for at in found)), None)


def _stay_on_loopback() -> None:
    """Ranks of one machine listen where no other can reach them, unless the user names an interface."""
    if interface := _loopback():
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, interface)


def _make_repeatable(train: TrainConfig) -> None:
    """Seed what libraries may draw, and the kernels train.deterministic asks for."""
    torch.manual_seed(train.seed)
    if train.deterministic:  # cuBLAS reads its variable when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(train.deterministic)


def stop() -> None:
    """Leave the groups, and what start() set for them: the next ones may span machines."""
    destroy_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
    for variable in INTERFACE_VARIABLES:
        if os.environ.get(variable) == _loopback():
            del os.environ[variable]
