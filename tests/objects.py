"""An S3 whose requests can be held up or denied."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
