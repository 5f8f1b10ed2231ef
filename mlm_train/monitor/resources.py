"""Memory in use, and the arithmetic peak that MFU divides by."""

import resource
import time

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocator peak on CUDA, resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_peak_flops(device: torch.device, precision: str, size: int = 1024, runs: int = 4) -> float:
    """FLOP/s of a square matrix product in the compute dtype: the best of a few runs, on this rank."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
