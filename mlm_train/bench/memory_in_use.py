"""Bytes of memory in use, and their peak: the process's on a CPU, those of torch's allocator elsewhere."""

import gc
import resource
import sys
from pathlib import Path
from typing import Protocol

import psutil
import torch

from mlm_train.utils.host_memory import give_back


class MemoryInUse(Protocol):
    """What is in use by this process where its model is."""

    def now(self) -> int:
        """Bytes in use."""
        ...

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        ...

    def peak(self) -> int:
        """The most bytes in use since `reset_peak`."""
        ...


def memory_in_use(device: torch.device) -> MemoryInUse:
    """That of a device."""
    return HostMemory() if device.type == "cpu" else DeviceMemory(device)


def status_bytes(name: str) -> int | None:
    """Bytes by a line of this process's status; None where the system has none (not Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None


class HostMemory:
    """The resident set of this process."""

    def now(self) -> int:
        gc.collect()
        give_back()
        resident: int = psutil.Process().memory_info().rss
        return resident

    def reset_peak(self) -> None:
        """Reset the peak, on Linux only; elsewhere it is the process's peak, an upper bound."""
        gc.collect()
        give_back()
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5", encoding="ascii")

    def peak(self) -> int:
        found = status_bytes("VmHWM")
        if found is not None:
            return found
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class DeviceMemory:
    """Tensors on a device, as torch's allocator counts them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)

    def now(self) -> int:
        gc.collect()
        return int(self.module.memory_allocated(self.device))

    def reset_peak(self) -> None:
        gc.collect()
        self.module.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return int(self.module.max_memory_allocated(self.device))
