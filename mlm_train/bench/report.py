"""Reports of benchmarks: rows of repeated measurements, ratios, and the machine."""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlm_train.errors import UserError
from mlm_train.utils.files import check_output, is_png, write_json, writing
from mlm_train.utils.records import json_value, read_regular


def row(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """A row of repeated measurements: median, minimum and maximum."""
    return {
        "name": name,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "unit": unit,
        "runs": len(values),
    }


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over turns of the ratio of two measurements."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine of a measurement. load_at_start: the load average of the last minute.

    device: its type; other than a CPU it is named.
    """
    import psutil
    import torch

    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads_per_process": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device != "cpu":
        found["device"] = torch.get_device_module(device).get_device_name()
    return found


def describe(machine: dict[str, Any]) -> str:
    """The result of machine() in one line."""
    threads = machine["threads_per_process"]
    device = f"{machine['device']}; " if "device" in machine else ""
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{threads} thread{'' if threads == 1 else 's'} per process, "
        f"load {machine['load_at_start']} at start; "
        f"Python {machine['python']}, torch {machine['torch']}"
    )


def _processor() -> str:
    """The processor's name, from the kernel where it has one."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def by_worker(order: dict[str, Any], start: Callable[[str], int]) -> dict[str, Any] | int:
    """Run a worker process on `order`. Returns its result, or its exit code where it failed.

    `start` runs the process, given the order's file, and returns its exit code. Order and result are passed
    in a temporary folder, since libraries write to the process's standard output.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "order.json"
        file.write_text(json.dumps(order), encoding="utf-8")
        code = start(str(file))
        if code:
            return code
        result: dict[str, Any] = json.loads(_result_of(file).read_text(encoding="utf-8"))
        return result


def read_order(order_file: str) -> dict[str, Any]:
    """Read the order, in a worker."""
    order: dict[str, Any] = json.loads(Path(order_file).read_text(encoding="utf-8"))
    return order


def write_result(order_file: str, result: dict[str, Any]) -> None:
    """Write the result, in a worker."""
    _result_of(Path(order_file)).write_text(json.dumps(result), encoding="utf-8")


def _result_of(order_file: Path) -> Path:
    return order_file.with_name("result.json")


def check_writable(path: Path, option: str = "--json") -> None:
    """Raise UserError for an unusable output file before minutes of measuring."""
    if option == "--plot":
        check_output(option, path, is_png, "PNG")
    else:
        check_output(option, path, _is_report, "report of a benchmark")


def check_outputs(args: argparse.Namespace) -> None:
    """check_writable of --json and --plot, where the benchmark has them and they are given."""
    for name in ("json", "plot"):
        file = getattr(args, name, None)
        if file is not None:
            check_writable(Path(file), f"--{name}")


def _is_report(path: Path) -> bool:
    try:
        tree = json_value(read_regular(path))
    except (ValueError, UserError):
        return False
    return isinstance(tree, dict) and {"machine", "rows"} <= tree.keys()


def write_report(
    path: Path,
    machine: dict[str, Any],
    rows: list[dict[str, Any]],
    ratios: dict[str, float],
    notes: Sequence[str] = (),
) -> None:
    """Write the JSON report of a benchmark. notes: remarks in plain text."""
    command = " ".join(["mlm-train", *sys.argv[1:]])
    tree: dict[str, Any] = {"machine": machine, "command": command, "rows": rows, "ratios": ratios}
    with writing(path):
        write_json(path, tree | ({"notes": list(notes)} if notes else {}))
