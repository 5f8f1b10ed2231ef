"""Helpers of tests of tables at a URL: an S3 whose requests can be held up, and access to its files."""

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Objects:
    """An S3 that can hold up requests, or deny them."""

    def __init__(self, listening: socket.socket) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._held: tuple[str, str] | None = None
        self._denied: str | None = None
        self.waiting, self._released = threading.Event(), threading.Event()
        listening.listen(64)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, fd=listening.fileno())

    def __call__(self, environ: dict[str, Any], respond: Callable[..., Any]) -> Any:
        held = self._held
        if held and environ["REQUEST_METHOD"] == held[0] and held[1] in environ["PATH_INFO"]:
            self.waiting.set()
            assert self._released.wait(120)
        if self._denied and environ["REQUEST_METHOD"] == "PUT" and self._denied in environ["PATH_INFO"]:
            respond("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return self._app(environ, respond)

    @contextmanager
    def denying(self, name: str) -> Iterator[None]:
        """Deny writes of this name while the block runs."""
        self._denied = name
        try:
            yield
        finally:
            self._denied = None

    def hold(self, method: str, name: str) -> None:
        """Hold up requests for this name from now on; `waiting` is set once there is one."""
        self.waiting.clear()
        self._released.clear()
        self._held = (method, name)

    def release(self) -> None:
        """Let held requests continue."""
        self._held = None
        self._released.set()


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
