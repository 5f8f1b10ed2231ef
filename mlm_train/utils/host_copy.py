"""A tensor on its way from a device to the CPU."""

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
