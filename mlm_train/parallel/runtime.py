"""The processes of a run: rank and device, process groups, the collectives of the training loop."""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
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
from mlm_train.parallel.mesh.exchange import largest
from mlm_train.parallel.mesh.groups import ProcessGroups, create_groups, forget_groups
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.utils.files import with_fix
from mlm_train.utils.host_memory import keep_freed

Result = TypeVar("Result")
ROUND = 2.0  # seconds
_DONE, _GOES_ON, _FAILED = range(3)  # a rank's work after a round; the largest is that of all
ZERO_BUBBLE_TORCH = (2, 13)  # older ones do not run zero-bubble schedules over our stages
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def world_size() -> int:
    """Processes of this launch, from torchrun's WORLD_SIZE; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of this launch on this node; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def global_rank() -> int:
    """The rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Runtime:
    """A rank's layout, device and process groups."""

    topology: Topology
    device: torch.device
    groups: ProcessGroups
    marker: ProgressMarker = field(default_factory=ProgressMarker)  # for the watchdog

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the rank that prints, and writes TensorBoard and manifests."""
        return self.topology.rank == 0

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum of a small tensor on the CPU over data parallel, on every rank."""
        values = values.clone()
        dist.all_reduce(values, group=self.groups.data_cpu.main)
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
        """The same ranks for another thread, with its own group and marker; every rank calls it.

        timeout: of the group's collectives, in seconds.
        """
        backend = None if dist.get_backend() == "fake" else "gloo"
        group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout))
        own = replace(self, marker=ProgressMarker(), groups=replace(self.groups, control=group))
        own.connect()
        return own

    def connect(self) -> None:
        """Have the methods below open their connections now.

        gloo opens them on demand, by the job's store, which is gone when a run whose agent was killed writes
        its last checkpoint.
        """
        self.broadcast(lambda: None)
        self.gather(lambda: None)
        self.gather_on_rank_0(None)
        largest(0, self.groups.control, self.device)

    def broadcast(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0; return its result, or raise its failure, on every rank."""
        outcome, error = _attempt(work) if self.is_rank_0 else (None, None)
        outcomes = [outcome]
        dist.broadcast_object_list(outcomes, src=0, group=self.groups.control)
        if error is not None:
            raise error
        assert outcomes[0] is not None
        return outcomes[0].result()

    def gather(self, work: Callable[[], Result]) -> list[Result]:
        """Run `work` on every rank; return the results by rank, or raise the first failure, on every rank."""
        return self._share(*_attempt(work))

    def _share(self, outcome: "_Outcome", error: Exception | None) -> list[Any]:
        """The results of all ranks by rank; raises the first failure. error: this rank's own."""
        outcomes: list[Any] = [None] * self.topology.world
        dist.all_gather_object(outcomes, outcome, group=self.groups.control)
        if error is not None:
            raise error
        return [outcome.result() for outcome in outcomes]

    def gather_on_rank_0(self, value: Result) -> list[Result]:
        """The values of all ranks, by rank, on rank 0; nothing on the others."""
        values: list[Any] | None = [None] * self.topology.world if self.is_rank_0 else None
        dist.gather_object(value, values, dst=0, group=self.groups.control)
        return values or []

    def in_rounds(self, phase: str, work: Iterator[None]) -> None:
        """Run every rank's `work` to its end; raise the first failure on every rank.

        The ranks meet every ROUND seconds, so that one that has finished is not taken for stuck while it
        waits for others: as long as all of them go on, all report progress. They exchange a number each
        time, and objects only where a rank has failed.
        """
        state = _GOES_ON
        while state == _GOES_ON:
            self.marker.at(phase)
            outcome, error = _attempt(lambda: self._continue(phase, work))
            state = largest(outcome.value if outcome.is_good else _FAILED, self.groups.control, self.device)
        if state == _FAILED:
            self._share(outcome, error)

    def _continue(self, phase: str, work: Iterator[None]) -> int:
        """Work for ROUND seconds. Returns _GOES_ON, or _DONE where it is finished."""
        end = time.monotonic() + ROUND
        for _ in work:
            self.marker.at(phase)
            if time.monotonic() >= end:
                return _GOES_ON
        return _DONE


@dataclass(frozen=True)
class _Outcome:
    """The result or the failure of a rank's work, in a form that can be sent."""

    value: Any = None
    user_error: str | None = None
    failure: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether there is a value."""
        return self.user_error is None and self.failure is None

    def result(self) -> Any:
        """The value; raises the failure on every rank alike, so that none waits for another."""
        if self.user_error is not None:
            raise SharedUserError(self.user_error)
        if self.failure is not None:
            raise PeerFailure(self.failure)
        return self.value


def _attempt(work: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
    """The outcome to send, and the exception that this rank raises itself, with its traceback."""
    try:
        return _Outcome(work()), None
    except UserError as error:
        return _Outcome(user_error=str(error)), None
    except OSError as error:
        return _Outcome(user_error=f"{error.filename or 'a file'}: {with_fix(error)}"), None
    except Exception as error:
        line = f"stopped because rank {global_rank()} failed first: {one_line(error)}"
        return _Outcome(failure=line), error


def check_device(choice: str, local_processes: int) -> None:
    """Raise UserError where this node lacks the devices that config field train.device asks for."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: torch finds no CUDA device here; set train.device=cpu")
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if choice == "auto" and allocated != "0" and not torch.cuda.is_available():
        raise UserError(
            f"this Slurm job has {allocated} GPUs on this node, but torch finds none: check `nvidia-smi` on "
            f"{socket.gethostname()}, or set train.device=cpu"
        )
    devices = torch.cuda.device_count()
    if choice != "cpu" and 0 < devices < local_processes:
        raise UserError(f"{local_processes} processes on this node, but {devices} CUDA devices: start fewer")


def check_compiler(train: TrainConfig) -> None:
    """Raise UserError where torch.compile, which generates C++ for a CPU, would find no compiler."""
    compiler = os.environ.get("CXX", "g++")
    on_cpu = train.device == "cpu" or not torch.cuda.is_available()
    if train.compile and on_cpu and shutil.which(compiler) is None:
        raise UserError(
            f"train.compile=True: needs a C++ compiler, and {compiler} is not on the PATH: install it, set "
            "another one in CXX, or leave train.compile out"
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
    """This rank's device for config field train.device: `auto` is CUDA where torch finds it."""
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start(config: Config) -> Runtime:
    """Initialize torch.distributed (gloo on CPU, NCCL on CUDA) and the process groups of the layout."""
    topology = Topology.of(config.parallel, world_size(), global_rank())
    topology.check_batch(config)
    check_torch(config.parallel)
    _set_determinism(config.train)
    device = pick_device(config.train.device)
    if device.type == "cpu":
        keep_freed()
    else:  # read at the first allocation: buffers of other sizes in each step would fragment fixed segments
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.parallel.timeout)
    if not dist.is_initialized():
        # Sockets to the ranks that a collective sends to, rather than to every rank from every group.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        keep_flight_records()
        if world_size() == local_world_size():
            _use_loopback()
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Runtime(topology, device, create_groups(config, topology, device, timeout), ProgressMarker(device))


def _loopback() -> str | None:
    """The name of this machine's loopback interface."""
    interfaces = psutil.net_if_addrs().items()
    return next(
        (name for name, addresses in interfaces if any(a.address == "127.0.0.1" for a in addresses)), None
    )


def _use_loopback() -> None:
    """Have gloo and NCCL listen on loopback alone, unless the user has set an interface."""
    if interface := _loopback():
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, interface)


def _set_determinism(train: TrainConfig) -> None:
    """Seed torch, and choose deterministic kernels where config field train.deterministic asks for them."""
    torch.manual_seed(train.seed)
    if train.deterministic:  # cuBLAS reads its variable when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if train.deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports the compiler
        torch.use_deterministic_algorithms(train.deterministic)


def stop() -> None:
    """Destroy the groups, and unset the interfaces that start() set: the next groups may span nodes."""
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_groups()
    for variable in INTERFACE_VARIABLES:
        if os.environ.get(variable) == _loopback():
            del os.environ[variable]
