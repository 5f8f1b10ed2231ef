"""What every benchmark writes: rows of repeated measurements, ratios, and the machine."""

import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm_train.errors import UserError
from mlm_train.files import write_json, writing


def row(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """A measurement repeated: median, smallest and largest."""
    return {
        "name": name,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "unit": unit,
        "runs": len(values),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on. load: processes that wanted a core in the last minute."""
    import psutil
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads_per_process": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def describe(found: dict[str, Any]) -> str:
    """machine() in one line."""
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB, "
        f"{found['threads_per_process']} thread a process, load {found['load_at_start']} at start; "
        f"Python {found['python']}, torch {found['torch']}"
    )


def _processor() -> str:
    """The kernel's name of the processor, where it has one."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def check_writable(path: Path) -> None:
    """UserError now rather than after minutes of measuring."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--json {path}: name a file in a folder that exists")


def write_report(
    path: Path, found: dict[str, Any], rows: list[dict[str, Any]], ratios: dict[str, float]
) -> None:
    """The JSON of a benchmark."""
    command = " ".join(["mlm-train", *sys.argv[1:]])
    with writing(path):
        write_json(path, {"machine": found, "command": command, "rows": rows, "ratios": ratios})
