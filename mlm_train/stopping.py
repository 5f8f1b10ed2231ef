"""Ctrl-C and SIGTERM, where a command has something to clean up: heard once, however often they come."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlm_train.errors import Terminated

# The same signal comes more than once: a scheduler signals all processes, a launcher passes its own on, and
# a hand is impatient.
ECHO_SECONDS = 5.0


@contextmanager
def stoppable() -> Iterator[None]:
    """End the body by KeyboardInterrupt, or by Terminated, which is one; further signals let it clean up.

    One that comes ECHO_SECONDS later ends the process at once. After a signal they are not heard as before:
    the process is ending, and what runs as it ends would answer with a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    first: float | None = None

    def stop(number: int, _: object) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if now - first > ECHO_SECONDS:
            os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if first is None:
            for number, handler in before.items():
                signal.signal(number, handler)
