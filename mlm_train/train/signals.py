"""Signals that ask a run to end: heard at once, obeyed after the step, by all ranks alike.

SIGUSR1 is a scheduler's warning before the time limit, SIGTERM ends a job. A rank only notes them; which
step is the last is agreed on in the sum that a step's metrics need anyway (train/step.py).
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlm_train.errors import START_AGAIN
from mlm_train.utils.signals import ECHO_SECONDS

# The first one counts where several came: a warned job is to be started again, however it ends then.
EXIT_CODE = {signal.SIGUSR1: START_AGAIN, signal.SIGTERM: 128 + signal.SIGTERM}
PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl(2)


def end_with_agent() -> None:
    """Get SIGTERM once torchrun's agent, which started this rank, is gone. Linux only.

    Nobody would watch the ranks any more, and they would keep the run's folder locked to the last step.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH, int(signal.SIGTERM))


class Signals:
    """What this rank has heard."""

    def __init__(self) -> None:
        self.since: dict[int, float] = {}  # number -> time.monotonic() of its first arrival

    def heard(self) -> list[float]:
        """1.0 or 0.0 for each signal of EXIT_CODE; `agreed` reads their sums over all ranks."""
        return [float(number in self.since) for number in EXIT_CODE]

    @staticmethod
    def agreed(sums: Sequence[float]) -> signal.Signals | None:
        """The signal that some rank has heard."""
        return next((number for number, count in zip(EXIT_CODE, sums, strict=True) if count), None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals in the body, which the main thread runs; a second SIGTERM ends the process at once.

        A thread reads them from Python's wake-up socket, so that one also counts while the main thread
        waits inside a library for a peer that never comes.
        """
        inbox, outbox = socket.socketpair()
        outbox.setblocking(False)
        thread = threading.Thread(target=self._listen, args=(inbox,), name="signals", daemon=True)
        thread.start()
        woken = signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in EXIT_CODE}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            outbox.close()
            thread.join()

    def _listen(self, inbox: socket.socket) -> None:
        with inbox:
            while message := inbox.recv(1):
                self._note(message[0])

    def _note(self, number: int) -> None:
        now = time.monotonic()
        first = self.since.setdefault(number, now)
        if number == signal.SIGTERM and now - first > ECHO_SECONDS:
            os._exit(EXIT_CODE[signal.SIGTERM])
