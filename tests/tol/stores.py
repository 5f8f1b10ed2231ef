"""What tests of tables at a URL need: an S3 that they can hold up, and looks at what lies there."""

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from mlm_train.tol.build.state import BuildState
from mlm_train.tol.storage.lease import OWNER
from mlm_train.tol.storage.object_store import ObjectStorage
from mlm_train.tol.storage.resolve import storage_at
from tests.tol.conftest import end


class Objects:
    """An S3 that can keep requests waiting, or deny them."""

    def __init__(self, listening: socket.socket) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._kept: tuple[str, str] | None = None
        self._denied: str | None = None
        self.waiting, self._go = threading.Event(), threading.Event()
        listening.listen(64)
        self.server = make_server("127.0.0.1", 0, self, threaded=True, fd=listening.fileno())

    def __call__(self, environ: dict[str, Any], respond: Callable[..., Any]) -> Any:
        kept = self._kept
        if kept and environ["REQUEST_METHOD"] == kept[0] and kept[1] in environ["PATH_INFO"]:
            self.waiting.set()
            assert self._go.wait(120)
        if self._denied and environ["REQUEST_METHOD"] == "PUT" and self._denied in environ["PATH_INFO"]:
            respond("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return self._app(environ, respond)

    @contextmanager
    def denying(self, name: str) -> Iterator[None]:
        """Meanwhile nobody may write this name."""
        self._denied = name
        try:
            yield
        finally:
            self._denied = None

    def keep(self, method: str, name: str) -> None:
        """Have requests for this name wait, from now on; `waiting` says that one does."""
        self.waiting.clear()
        self._go.clear()
        self._kept = (method, name)

    def release(self) -> None:
        """Let those that wait go on."""
        self._kept = None
        self._go.set()


def names(url: str) -> list[str]:
    """All files, the owner's mark too."""
    storage = storage_at(url)
    return sorted([*storage.names(), *([OWNER] if storage.read(OWNER) is not None else [])])


def done(url: str) -> int:
    """Committed partitions."""
    state = BuildState.load(storage_at(url))
    return 0 if state is None else len(state.done)


def wait_until(holds: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < until, "nothing happened"
        assert process.poll() is None, f"it ended first: {process.communicate()[0]}"
        time.sleep(0.005)


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL of a builder, and of what it leaves."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    end(children)


def put(url: str, name: str, data: bytes) -> None:
    """As a stranger would."""
    storage = storage_at(url)
    assert isinstance(storage, ObjectStorage)
    storage._fs.pipe_file(storage._path(name), data)


def flip(url: str, name: str) -> None:
    data = bytearray(storage_at(url).read(name) or b"")
    data[-5] ^= 1
    put(url, name, bytes(data))
