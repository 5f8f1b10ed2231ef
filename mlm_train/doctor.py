"""`mlm-train doctor`: show what this machine can run and what is missing."""

import argparse
import importlib.metadata
import os
import platform
import shutil

HELP = """Show this machine's processors, memory, devices, packages and Slurm.

example:
  mlm-train doctor"""

PACKAGES = ("torch", "deepspeed", "megatron-core", "ray", "datasets", "sentencepiece", "tensorboard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the findings. Returns 1 where a package is missing."""
    import psutil
    import torch

    missing = False
    lines = {
        "python": platform.python_version(),
        "processors": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
        "bf16 matrix units": "yes" if torch.cpu._is_amx_tile_supported() else "no",
        "devices": _devices(),
        "slurm": shutil.which("sbatch") or "not on this machine",
    }
    for package in PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = f"missing: pip install {package}"
            missing = True
    for name, value in lines.items():
        print(f"{name:20s} {value}")
    return int(missing)


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return "CPU only (gloo)"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} x {names[0]} (NCCL)"
