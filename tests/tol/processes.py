"""Processes of a build: its workers, and what a killed builder leaves."""

import contextlib
import re
import shutil

import psutil

from mlm_train.tol.build.worker import PROCESS_TITLE


def worker_processes(process: psutil.Process, method: str) -> list[psutil.Process]:
    """Workers among the descendants of a process that run this method now; "" for idle ones."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] == [f"{PROCESS_TITLE}.{method}"]:
                found.append(child)
    return found


def kill_leftovers(processes: list[psutil.Process]) -> None:
    """Kill the Ray processes that a dead builder left (they notice it late), and remove their folders."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for scratch in re.findall(r"/tmp/mlm-ray-\w+", str(process.cmdline())):
                shutil.rmtree(scratch, ignore_errors=True)
            process.kill()
