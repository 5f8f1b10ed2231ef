"""Copies from pinned memory to an accelerator, on a stream beside the computation's."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Upload:
    """Blocks of pinned memory and their copies on a device, each with an event for its end.

    No call waits for the device. Blocks are held until the upload is; memory that is freed before a copy has
    ended is not given out again before that, by torch's allocators of pinned and of device memory.
    """

    def __init__(self, blocks: Sequence[Tensor], stream: torch.Stream) -> None:
        self._blocks, self._stream = blocks, stream
        with _again(stream):  # with memory of another stream a copy would have to wait for that one's work
            self._copies = [torch.empty_like(block, device=stream.device) for block in blocks]
        self._ends = [torch.Event(stream.device) for _ in blocks]

    def begin(self, number: int) -> None:
        """Queue the copy of a block, which is not written to afterwards. From any thread."""
        with _again(self._stream):
            self._copies[number].copy_(self._blocks[number], non_blocking=True)
        self._ends[number].record(self._stream)

    def __getitem__(self, number: int) -> Tensor:
        """The copy of a block that has begun: the current stream's later work waits for its end, alone."""
        computing = torch.accelerator.current_stream(self._stream.device)
        computing.wait_event(self._ends[number])
        self._copies[number].record_stream(computing)
        return self._copies[number]


def _again(stream: torch.Stream) -> torch.Stream:
    """Another object for the stream: one is entered by one thread at a time."""
    return torch.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )


def stream_beside(device: torch.device) -> torch.Stream | None:
    """A new stream of an accelerator; None for a CPU."""
    return None if device.type == "cpu" else torch.Stream(device)
