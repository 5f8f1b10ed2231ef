"""Ctrl-C and SIGTERM: heard from a command's first line to its last, once, however often they come.

A signal raises KeyboardInterrupt (SIGTERM: Terminated, which is one) wherever the main thread is, but for
places where that would do harm: while a module is imported, which would stay half loaded; while a finished
result is put in place (`held`); while an exception is handled, since that cleans up. There it waits. Where a
library swallows what was raised it is raised again.

Imports as little as it can: what comes before `listen` is not heard.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlm_train.errors import Terminated

# The same signal comes more than once: a scheduler signals all processes, a launcher passes its own on, and
# a hand is impatient.
ECHO_SECONDS = 5.0
_LOOK_SECONDS = 0.05  # from one look at whether a signal that waits can be raised to the next
_IMPORTING = "<frozen importlib._bootstrap"  # the file that frames of an import name


class _Listener:
    """The signals of this process; there is one."""

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None  # the first one
        self.since = 0.0  # time.monotonic() of it
        self.holds = 0  # `held` blocks that the main thread is in
        self.from_start = False  # of the process: it listens to its end
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def begin(self) -> None:
        # A rank that waits in a library for a peer would hear nothing: until it trains SIGTERM ends it.
        numbers = [signal.SIGINT] if "RANK" in os.environ else [signal.SIGINT, signal.SIGTERM]
        # A shell has those ignored that are not meant for what it runs in the background.
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self.heard, self.holds = None, 1
        self._before = {number: signal.signal(number, self._hear) for number in numbers}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._not_raised

    def end(self, deaf: bool = False) -> None:
        """Raise nothing more. Be `deaf` to what still comes, else as before, where nothing has come yet."""
        for number, handler in self._before.items():
            if deaf or self.heard is None:
                signal.signal(number, signal.SIG_IGN if deaf else handler)
        if self.heard is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        sys.unraisablehook = self._hook

    def raise_now(self) -> None:
        """What was heard, if anything was, where nothing stands against it."""
        self._look(signal.SIGALRM, sys._getframe())

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.heard is None:
            self.heard, self.since = signal.Signals(number), now
            signal.signal(signal.SIGALRM, self._look)
            signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
            self._look(number, frame)
        elif now - self.since > ECHO_SECONDS:
            os._exit(128 + number)

    def _look(self, _: int, frame: FrameType | None) -> None:
        if self.heard is None or self.holds or sys.exception() is not None or _importing(frame):
            return
        raise Terminated if self.heard == signal.SIGTERM else KeyboardInterrupt

    def _not_raised(self, error: Any) -> None:
        """A finaliser, or a callback of a library, has swallowed an exception."""
        if not issubclass(error.exc_type, KeyboardInterrupt):
            self._hook(error)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            return True
        frame = frame.f_back
    return False


_listener = _Listener()


def listen() -> None:
    """Hear signals, and hold them until the `stoppable` block."""
    _listener.begin()
    _listener.from_start = True


def deafen() -> None:
    """Let pass what still comes: the process ends anyway."""
    _listener.end(deaf=True)


def heard() -> signal.Signals | None:
    """The signal that has come, raised or not yet: whatever fails since fails because of it."""
    return _listener.heard


@contextmanager
def stoppable() -> Iterator[None]:
    """End the body by KeyboardInterrupt, or by Terminated, which is one; further signals let it clean up.

    One that comes ECHO_SECONDS later ends the process at once. Begins to listen where nobody did; ends that
    again where no signal came. After one they are not heard as before: the process is ending, and what runs
    as it ends would answer with a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    if not _listener.from_start:
        _listener.begin()
    try:
        _listener.holds = 0
        _listener.raise_now()
        yield
        _listener.raise_now()
    finally:
        _listener.holds = 1
        if not _listener.from_start:
            _listener.end()


@contextmanager
def held() -> Iterator[None]:
    """Keep signals back while the body runs; then they are raised."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener.holds += 1
    try:
        yield
    finally:
        _listener.holds -= 1
        _listener.raise_now()


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started in the body never hear Ctrl-C, which a terminal sends to all: we end them.

    From their first moment: their start would answer it with a traceback. Here it is heard after the body,
    since one that is not told all it is to do says so in another.
    """
    with held():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
