"""A thread on every rank that reports a main thread which no longer moves, and ends the run.

Ranks tell each other on the board (status_store.py): every thread leaves a sign of life, the first one that
finds its main thread stuck asks all others where they are and prints one report for the whole run. Then
every rank exits with code HUNG.
"""

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlm_train.config import Config
from mlm_train.errors import HUNG, escaped
from mlm_train.parallel.health.failures import FAILED, explain_failure, folder_of, now
from mlm_train.parallel.health.hang_report import RankStatus, hang_report
from mlm_train.parallel.health.progress_marker import Mark, ProgressMarker
from mlm_train.parallel.health.status_store import StatusStore, bounded
from mlm_train.parallel.health.thread_stacks import flight_record, main_thread, pending, write_evidence
from mlm_train.parallel.mesh.topology import Topology

FAILURE_GRACE = 10.0  # seconds a rank has to find by itself that another has failed


@contextlib.contextmanager
def watched(config: Config, topology: Topology, marker: ProgressMarker) -> Iterator[None]:
    """Watch the body on this rank; sort out whose failure is shown. Every rank calls it.

    Raises PeerFailure instead of an error that only follows from another rank's.
    """
    world = topology.world
    store = bounded(lambda: StatusStore(topology.rank, world), 60) if world > 1 else None
    watchdog = Watchdog(config, topology, marker, store)
    watchdog.sign()  # before any work: a rank that is stopped at once can be named, too
    watchdog.start()
    try:
        yield
        if store is not None:
            store.post(f"done/{topology.rank}", {})
    except Exception as error:
        watchdog.stop()
        if store is not None:
            output, linger = Path(config.train.output), watchdog.interval + 0.5
            explain_failure(error, store, watchdog.described(), output, linger)
        raise
    finally:
        watchdog.stop()


def limits(config: Config) -> tuple[float, float]:
    """Seconds without progress that are allowed: usually, and in tasks that may take long.

    Both end before a collective's own timeout, which knows less. Infinite where train.watchdog_timeout is 0.
    """
    timeout, chosen = config.parallel.timeout, config.train.watchdog_timeout
    if chosen == 0:
        return float("inf"), float("inf")
    usual = timeout / 2 if chosen is None else chosen
    return usual, max(usual, 0.9 * timeout)


class Watchdog(threading.Thread):
    """The thread. It only reads the main thread's mark, and talks to the board."""

    def __init__(
        self, config: Config, topology: Topology, marker: ProgressMarker, store: StatusStore | None
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.topology, self.marker, self.store = topology, marker, store
        self.usual, self.patient = limits(config)
        self.output = Path(config.train.output)
        self.interval = min(5.0, self.usual / 8)
        self.ended = threading.Event()
        self.awake = self.heard = time.monotonic()  # running without a pause; neighbour's latest sign
        self.neighbour: dict[str, Any] | None = None  # that sign
        self.stderr = os.dup(2)  # a library's import may have redirected the usual one

    def stop(self) -> None:
        """End the thread; again is fine."""
        self.ended.set()

    def sign(self) -> None:
        """Tell the others that this rank lives, and where it is."""
        if self.store is not None:
            self.store.post(f"alive/{self.topology.rank}", asdict(self._said()) | {"seconds": time.time()})

    def run(self) -> None:
        """Look, and leave a sign of life, several times in the allowed time."""
        try:
            self._watch()
        finally:
            os.close(self.stderr)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self.ended.wait(self.interval):
            moment = time.monotonic()
            if moment - looked > 3 * self.interval + 1:
                self.awake = moment  # the whole process was suspended: the main thread is not to blame
            looked = moment
            if self.store is not None and self._peers_ended(self.store):
                return
            limit = self.patient if self.marker.mark.patient else self.usual
            if self._age(self.marker.mark.since) > limit:
                self._end_hung(limit)

    def described(self) -> str:
        """Where the main thread is, in words."""
        stage = self._stage(self.marker.mark)
        return f"{'' if stage is None else f'stage {stage}, '}{self.marker.mark}"

    def _age(self, since: float) -> float:
        return time.monotonic() - max(since, self.awake)

    def _stage(self, mark: Mark) -> int | None:
        if self.topology.pipeline == 1:
            return None
        return self.topology.pipeline_rank if mark.stage is None else mark.stage

    def _peers_ended(self, store: StatusStore) -> bool:
        """Leave a sign of life and read the others' word; True where this thread is to end."""
        rank, world = self.topology.rank, self.topology.world
        self.sign()
        if (hung := store.read("hung")) is not None:
            self._end_hung(hung["limit"])
        # A stopped rank cannot speak for itself; that no thread of it moves is no question of patience.
        neighbour = (rank + 1) % world
        sign = store.read(f"alive/{neighbour}")
        if sign != self.neighbour or store.lost:
            self.neighbour, self.heard = sign, time.monotonic()
        elif self._age(self.heard) > self.usual and store.read(f"done/{neighbour}") is None:
            self._end_hung(self.usual)
        failed = store.read(FAILED)
        if failed is None:
            return False
        if not self.ended.wait(FAILURE_GRACE):  # the main thread has not found out
            line = f"stopped in {self.described()}, because rank {failed['rank']} failed first: "
            self._say(f"mlm-train: [rank {self.topology.rank}] {line}{escaped(failed['error'])}")
            self._exit(1)
        return True

    def _said(self) -> RankStatus:
        mark = self.marker.mark
        return RankStatus(
            self.topology.rank, socket.gethostname(), self._stage(mark), str(mark), self._age(mark.since)
        )

    def _end_hung(self, limit: float) -> None:
        """Say where this rank is; the first one to come here collects and reports; exit."""
        rank, store = self.topology.rank, self.store
        found, record = main_thread(), bounded(flight_record, 5)
        statement = replace(self._said(), pending=pending(record), **found._asdict())
        claim: dict[str, Any] = {"rank": rank, "limit": limit, "when": now()}
        first = store.claim("hung", claim) if store is not None else claim
        folder = folder_of(self.output, first["when"])
        bounded(lambda: write_evidence(folder, rank, statement.line(), record), 5)
        wait = 2 * self.interval + 2
        if store is not None:
            store.post(f"statement/{rank}", asdict(statement))
            if first["rank"] != rank and store.await_note("reported", wait + 5) is not None:
                self._exit(HUNG)
        statements = self._statements(statement, wait)
        ending = f"all ranks end with exit code {HUNG}; stacks of all threads: {folder}"
        report = hang_report(statements, first["limit"], ending)
        self._say(report)
        bounded(lambda: (folder / "report.txt").write_text(f"{report}\n", encoding="utf-8"), 5)
        if store is not None:
            store.post("reported", {})
            time.sleep(1.0)  # the store may end with this process: let the others read it
        self._exit(HUNG)

    def _statements(self, own: RankStatus, seconds: float) -> list[RankStatus]:
        """Everyone's, in the order of ranks; of those who stay silent, their last sign of life."""
        if self.store is None or self.store.lost:
            return [own]
        end = time.monotonic() + seconds
        found = []
        for rank in range(self.topology.world):
            note = self.store.await_note(f"statement/{rank}", max(0.0, end - time.monotonic()))
            if note is None and rank != own.rank:
                never = asdict(RankStatus(rank, "?", None, "", -math.inf))  # of time.time(): always before
                note = self.store.read(f"alive/{rank}") or never
                note |= {"answers": False, "seconds": time.time() - note["seconds"]}
            found.append(own if note is None else RankStatus(**note))
        return found

    def _say(self, text: str) -> None:
        """Straight to the terminal: the main thread may hold the locks of sys.stderr."""
        with contextlib.suppress(OSError):
            os.write(self.stderr, f"{text}\n".encode())

    def _exit(self, code: int) -> None:
        """Out at once: a stuck main thread cannot be unwound."""
        bounded(lambda: (sys.stdout.flush(), sys.stderr.flush()), 2)
        os._exit(code)
