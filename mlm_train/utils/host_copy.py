"""Tensors on their way from a device to the CPU."""

from collections.abc import Iterable

import torch
from torch import Tensor


class HostCopy:
    """Copies a tensor to the CPU without waiting for the device; `wait` returns it there."""

    def __init__(self, tensor: Tensor) -> None:
        self.here, self.arrival = tensor, None
        if tensor.device.type != "cpu":
            self.here = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.here.copy_(tensor, non_blocking=True)
            self.arrival = torch.Event(tensor.device)
            self.arrival.record()

    @property
    def has_arrived(self) -> bool:
        """Whether `wait` would not wait."""
        return self.arrival is None or self.arrival.query()

    def wait(self) -> Tensor:
        """The tensor on the CPU."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.here


def copy_to_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of tensors on the CPU, complete on return.

    An accelerator's go to pinned memory on a stream of their own, and are waited for when all are under way.
    """
    copies: list[HostCopy] = []
    sources: list[Tensor] = []  # kept until they are copied
    stream: torch.Stream | None = None
    for tensor in tensors:
        if tensor.device.type == "cpu":
            copies.append(HostCopy(tensor.clone()))
            continue
        if stream is None:
            stream = torch.Stream(tensor.device)
        stream.wait_stream(torch.accelerator.current_stream(tensor.device))
        with stream:
            copies.append(HostCopy(tensor))
        sources.append(tensor)
    return [copy.wait() for copy in copies]
