"""Handle Ctrl-C and SIGTERM once, from a command's first line to its last, however often they arrive.

A signal raises KeyboardInterrupt (SIGTERM: its subclass Terminated) in the main thread, except where that
would do harm: while a module is imported, which would stay half loaded; while a finished result is renamed
(`held`); while an exception is handled, since that cleans up. There it is delayed. Where a library swallows
the exception, it is raised again.

This module imports as little as possible: signals before `listen` are not handled.
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

# The same signal arrives more than once: a scheduler signals all processes, a launcher forwards its own, and
# users press Ctrl-C again.
ECHO_SECONDS = 5.0
_POLL_SECONDS = 0.05  # between attempts to raise a delayed signal
_IMPORTING = "<frozen importlib._bootstrap"  # file name of an import's frames
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl(2)


class _Listener:
    """The signal state of this process; a singleton."""

    def __init__(self) -> None:
        self.heard: signal.Signals | None = None  # the first signal
        self.since = 0.0  # time.monotonic() of the first signal
        self.holds = 0  # nesting depth of `held` in the main thread
        self.from_start = False  # whether `listen` was called: for the life of the process
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def begin(self) -> None:
        # A rank blocked in a library would not handle SIGTERM, so until training starts the default ends it.
        numbers = [signal.SIGINT] if "RANK" in os.environ else [signal.SIGINT, signal.SIGTERM]
        # A shell starts background jobs with signals ignored that are not meant for them.
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self.heard, self.holds = None, 1
        self._before = {number: signal.signal(number, self._hear) for number in numbers}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._not_raised

    def end(self, deaf: bool = False) -> None:
        """Stop raising. `deaf`: ignore further signals; else restore handlers, unless a signal has come."""
        for number, handler in self._before.items():
            if deaf or self.heard is None:
                signal.signal(number, signal.SIG_IGN if deaf else handler)
        if self.heard is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        sys.unraisablehook = self._hook

    def raise_now(self) -> None:
        """Raise the signal's exception, if one has come and nothing delays it."""
        self._poll(signal.SIGALRM, sys._getframe())

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.heard is None:
            self.heard, self.since = signal.Signals(number), now
            signal.signal(signal.SIGALRM, self._poll)
            signal.setitimer(signal.ITIMER_REAL, _POLL_SECONDS, _POLL_SECONDS)
            self._poll(number, frame)
        elif now - self.since > ECHO_SECONDS:
            os._exit(128 + number)

    def _poll(self, _: int, frame: FrameType | None) -> None:
        if self.heard is None or self.holds or sys.exception() is not None or _importing(frame):
            return
        raise Terminated if self.heard == signal.SIGTERM else KeyboardInterrupt

    def _not_raised(self, error: Any) -> None:
        """sys.unraisablehook: a finalizer or a library's callback has swallowed an exception."""
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
    """Start handling signals, and delay them until the `stoppable` block."""
    _listener.begin()
    _listener.from_start = True


def deafen() -> None:
    """Ignore further signals: the process is ending."""
    _listener.end(deaf=True)


def heard() -> signal.Signals | None:
    """The signal that has come, raised or not yet; any later failure is a consequence of it."""
    return _listener.heard


@contextmanager
def stoppable() -> Iterator[None]:
    """Let a signal end the body with KeyboardInterrupt or its subclass Terminated.

    Further signals within ECHO_SECONDS are ignored so that it can clean up; a later one ends the process at
    once. Where `listen` was not called, signals are handled for the body only. After a signal the former
    handlers are not restored: the process is ending, and they would print a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread only
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
    """Delay signals until the body has run."""
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
    """Block Ctrl-C in child processes started in the body; a terminal sends it to all, the parent ends them.

    It is blocked from their start, where it would print a traceback. In this process it is delayed until
    after the body, since an interrupted handover would make a child print one too.
    """
    with held():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent dies, however that ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PARENT_DEATH, int(number))
