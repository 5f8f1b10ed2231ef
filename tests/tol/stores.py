"""Helpers of tests of tables at a URL: builds there, and access to its files."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.state import BuildState
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.storage.lease import OWNER
from mlm_train.tol.storage.object_store import ObjectStorage
from mlm_train.tol.storage.resolve import storage_at
from tests.tol.processes import kill_leftovers

PARTITIONS = 24
LOW_RANK = TableSpec(dtype="int8", group_size=8, rank=16)
OPTIONS = ("--dtype", "int8", "--group-size", "8", "--rank", "16", "--partitions", PARTITIONS)


def build(model: Path, output: str | Path, spec: TableSpec = LOW_RANK, **options: Any) -> Build:
    return Build(model, output, spec, **{"partitions": PARTITIONS} | options)


def names(url: str) -> list[str]:
    """The names of all files, including the lease file."""
    storage = storage_at(url)
    return sorted([*storage.names(), *([OWNER] if storage.read(OWNER) is not None else [])])


def done(url: str) -> int:
    """The number of committed partitions."""
    state = BuildState.load(storage_at(url))
    return 0 if state is None else len(state.done)


def wait_until(holds: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        assert process.poll() is None, f"it ended first: {process.communicate()[0]}"
        time.sleep(0.005)


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill a builder, and what it leaves."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    kill_leftovers(children)


def put(url: str, name: str, data: bytes) -> None:
    """Write a file without a lease, as a foreign program would."""
    storage = storage_at(url)
    assert isinstance(storage, ObjectStorage)
    storage._fs.pipe_file(storage._path(name), data)


def flip(url: str, name: str) -> None:
    data = bytearray(storage_at(url).read(name) or b"")
    data[-5] ^= 1
    put(url, name, bytes(data))
