"""Signals that ask a run to end: noted at once, obeyed after the step, on all ranks alike.

SIGUSR1 is a scheduler's warning before the time limit; SIGTERM ends a job. A rank only notes them; the ranks
agree on the last step in the all-reduce of the step's metrics (train/step.py).
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlm_train.errors import START_AGAIN
from mlm_train.utils.signals import ECHO_SECONDS, end_with_parent

# If several arrived, the first one listed counts: a warned job is to be restarted in any case.
EXIT_CODE = {signal.SIGUSR1: START_AGAIN, signal.SIGTERM: 128 + signal.SIGTERM}


def end_with_agent() -> None:
    """Have Linux send this rank SIGTERM when torchrun's agent, its parent, dies.

    Without the agent nobody watches the ranks, which would keep the run's folder locked to the last step.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


class Signals:
    """Signals received by this rank."""

    def __init__(self) -> None:
        self.since: dict[int, float] = {}  # number -> time.monotonic() of its first arrival

    def heard(self) -> list[float]:
        """1.0 or 0.0 by signal of EXIT_CODE: whether it arrived. `agreed` takes the sums over all ranks."""
        return [float(number in self.since) for number in EXIT_CODE]

    @staticmethod
    def agreed(sums: Sequence[float]) -> signal.Signals | None:
        """The signal that some rank has received, from the sums of `heard`; None if there is none."""
        return next((number for number, count in zip(EXIT_CODE, sums, strict=True) if count), None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals in the body, run by the main thread; a second SIGTERM ends the process at once.

        A thread reads them from Python's wake-up socket, so that they are also noted while the main thread is
        blocked inside a library.
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
