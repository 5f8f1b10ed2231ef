"""Memory in use, and the arithmetic peak that MFU divides by."""

import re
import resource
import time

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocator peak on CUDA, resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Dense products without sparsity of one accelerator, 1e12 FLOP/s in bf16 and fp32: its maker's datasheet.
# What stands in the device's name -> peaks; the longest that fits.
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
    """FLOP/s that the datasheet of a device of that name gives; None where no datasheet is known."""
    words = re.split(r"[\s-]+", name)
    found = [key for key in DATASHEETS if set(key.split()) <= set(words)]
    return 1e12 * DATASHEETS[max(found, key=len)][precision != "bf16"] if found else None


def peak_flops(device: torch.device, precision: str, given: float | None) -> dict[str, float]:
    """What MFU is measured against, by name, FLOP/s of one rank.

    `datasheet`: `given` (1e12 FLOP/s, config field monitor.peak_tflops) or the device's, where known;
    `measured`: a large product's, here and now.
    """
    sheet = None if given is None else given * 1e12
    if sheet is None and device.type == "cuda":
        sheet = datasheet_peak_flops(torch.cuda.get_device_name(device), precision)
    measured = {"measured": measured_peak_flops(device, precision)}
    return measured if sheet is None else {"datasheet": sheet} | measured


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
