"""Worker processes that run the cases of tools/fuzz.py, and are killed where a case takes too long."""

import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, Protocol

LIMIT = 10.0  # seconds per case
ROOM = 6 * 2**30  # bytes of memory that a process may allocate
CASES_PER_PROCESS = 250
KINDS = ("traceback", "code", "time", "result")  # of bad outcomes


class Outcome(NamedTuple):
    """The outcome of a case. kind: accepted, refused, or one of KINDS."""

    number: int
    reader: str
    what: str
    kind: str
    said: str = ""


class Cases(Protocol):
    """The cases to run."""

    def run(self, number: int) -> Outcome:
        """Run a case in this process."""

    def lost(self, number: int, said: str) -> Outcome:
        """The outcome of a case whose process gave none."""


class Worker:
    """A forked process that runs cases one after another."""

    def __init__(self, fuzz: Cases) -> None:
        self.end, child_end = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_serve, args=(fuzz, child_end, self.end), daemon=True)
        self.process.start()
        child_end.close()
        self.number: int | None = None
        self.done, self.since = 0, 0.0

    def give(self, number: int) -> None:
        """Start a case in the process."""
        self.number, self.since = number, time.monotonic()
        self.done += 1
        with contextlib.suppress(OSError):  # it has died: `outcomes` notices
            self.end.send(number)

    def kill(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.end.close()


def _serve(fuzz: Cases, end: Connection, other: Connection) -> None:
    other.close()
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # libraries write to them
        os.dup2(null, descriptor)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    with contextlib.suppress(EOFError):
        while True:
            number = end.recv()
            try:
                end.send(tuple(fuzz.run(number)))
            except Exception as error:  # not the reader's: `Cases.run` reports those
                end.send(f"{type(error).__name__}: {error}")


def outcomes(fuzz: Cases, cases: int, processes: int) -> Iterator[Outcome]:
    """Run all cases. Yields their outcomes as they end."""
    waiting = iter(range(cases))
    workers: list[Worker] = []
    tried: set[int] = set()  # the machine may have been busy, or a process too full after many cases

    def feed(worker: Worker | None) -> None:
        if worker is not None and worker.done >= CASES_PER_PROCESS:
            workers.remove(worker)
            worker.kill()
            worker = None
        if (number := next(waiting, None)) is None:
            if worker is not None:
                workers.remove(worker)
                worker.kill()
            return
        if worker is None:
            worker = Worker(fuzz)
            workers.append(worker)
        worker.give(number)

    for _ in range(min(processes, cases)):
        feed(None)
    while workers:
        ready = wait([worker.end for worker in workers], timeout=0.2)
        for worker in list(workers):
            assert worker.number is not None
            if worker.end in ready:
                try:
                    found = worker.end.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    found = f"its process died: exit code {worker.process.exitcode}"
                if not isinstance(found, str):
                    yield Outcome(*found)
                    feed(worker)
                    continue
            elif time.monotonic() - worker.since > LIMIT:
                found = f"no result in {LIMIT:.0f} s"
            else:
                continue
            workers.remove(worker)
            worker.kill()
            if worker.number in tried:
                yield fuzz.lost(worker.number, found)
                feed(None)
            else:
                tried.add(worker.number)
                workers.append(again := Worker(fuzz))
                again.give(worker.number)
