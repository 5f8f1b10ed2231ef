"""Memory in use, and the arithmetic peak that MFU divides by."""

import resource
import time

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocator peak on CUDA, resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of square matrix products in the compute dtype on this rank: the best of four rounds.

    A device gets large products, several a round, so that neither launch nor wait counts.
    """
    size, products = (8192, 10) if device.type == "cuda" else (1024, 1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)  # no random numbers: the run owns them
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(products):
            product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return products * 2 * size**3 / best
