"""Memory in use, and the peak FLOP/s that MFU is relative to."""

import re
import resource
import time

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far, bytes: of the allocator on CUDA, resident set size of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Datasheet peaks of dense matmuls without sparsity: words of the device's name -> 1e12 FLOP/s in bf16, fp32.
# The longest matching key counts.
DATASHEETS = {
    "A100": (312.0, 19.5),
    "H100": (989.4, 67.0),  # SXM
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H200": (989.4, 67.0),
    "GH200": (989.4, 67.0),
    "B200": (2250.0, 75.0),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "MI300X": (1307.4, 163.4),
}


def datasheet_peak_flops(name: str, precision: str) -> float | None:
    """Datasheet FLOP/s of a device by its name; None if unknown."""
    words = re.split(r"[\s-]+", name)
    matching = [key for key in DATASHEETS if set(key.split()) <= set(words)]
    return 1e12 * DATASHEETS[max(matching, key=len)][precision != "bf16"] if matching else None


def peak_flops(device: torch.device, precision: str, given: float | None) -> dict[str, float]:
    """The peaks that MFU is relative to, by name, FLOP/s of one rank.

    datasheet: `given` (1e12 FLOP/s, config field monitor.peak_tflops), else the device's if known.
    measured: that of a large matmul on this device.
    """
    sheet = None if given is None else given * 1e12
    if sheet is None and device.type == "cuda":
        sheet = datasheet_peak_flops(torch.cuda.get_device_name(device), precision)
    measured = {"measured": measured_peak_flops(device, precision)}
    return measured if sheet is None else {"datasheet": sheet} | measured


def measured_peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of square matmuls in the compute dtype on this rank: the best of four rounds.

    A GPU gets large matmuls, several per round, to hide launch and synchronisation.
    """
    size, matmuls = (8192, 10) if device.type == "cuda" else (1024, 1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)  # not random: the run's generator must not advance
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(matmuls):
            product = a @ a
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return matmuls * 2 * size**3 / best
