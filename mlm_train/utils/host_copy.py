"""Tensors on their way from a device to the CPU."""

from collections.abc import Iterable

import torch
from torch import Tensor


class HostCopy:
    """Copies a tensor to the CPU without waiting for the device; `wait` returns it there.

    room: memory there to copy it to; by default new, or where it is on the CPU already, its own.
    """

    def __init__(self, tensor: Tensor, room: Tensor | None = None) -> None:
        self.here, self.arrival = tensor, None
        if room is not None or tensor.device.type != "cpu":
            self.here = _memory_for(tensor) if room is None else room
            self.here.copy_(tensor, non_blocking=True)
        if tensor.device.type != "cpu":
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


def copy_to_host(tensors: Iterable[Tensor], room: list[Tensor] | None = None) -> list[Tensor]:
    """Copies of tensors on the CPU, complete on return.

    An accelerator's go to pinned memory on a stream of their own, and are waited for when all are under way.
    room: an earlier call's copies that nobody needs any more. They are overwritten, and replaced by these:
    the pages of new memory cost more than the copy, and pinning them much more.
    """
    room = [] if room is None else room
    copies: list[HostCopy] = []
    sources: list[Tensor] = []  # kept until they are copied
    stream: torch.Stream | None = None
    for number, tensor in enumerate(tensors):
        there = room[number] if number < len(room) and _fits(room[number], tensor) else _memory_for(tensor)
        if tensor.device.type == "cpu":
            copies.append(HostCopy(tensor, there))
            continue
        if stream is None:
            stream = torch.Stream(tensor.device)
        stream.wait_stream(torch.accelerator.current_stream(tensor.device))
        with stream:
            copies.append(HostCopy(tensor, there))
        sources.append(tensor)
    room[:] = [copy.wait() for copy in copies]
    return list(room)


def _fits(room: Tensor, tensor: Tensor) -> bool:
    return room.shape == tensor.shape and room.dtype == tensor.dtype


def _memory_for(tensor: Tensor) -> Tensor:
    """Memory on the CPU, pinned where an accelerator's tensor is copied to it."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
