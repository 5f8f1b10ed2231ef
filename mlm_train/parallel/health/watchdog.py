"""A thread on every rank that reports a main thread without progress, and ends the run.

The threads use the status store (status_store.py): each posts heartbeats; the first one that finds its main
thread stuck collects the status of all ranks and prints one report for the whole run. Then every rank exits
with code HUNG.
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
from mlm_train.parallel.health.status_store import StatusStore, with_timeout
from mlm_train.parallel.health.thread_stacks import flight_record, main_thread, pending, write_evidence
from mlm_train.parallel.mesh.topology import Topology

FAILURE_GRACE = 10.0  # seconds for a main thread to notice that another rank has failed


@contextlib.contextmanager
def watched(config: Config, topology: Topology, marker: ProgressMarker) -> Iterator[None]:
    """Watch the body on this rank, and decide whose failure is shown. Every rank calls it.

    Raises PeerFailure instead of an error that another rank's failure has caused.
    """
    world = topology.world
    store = with_timeout(lambda: StatusStore(topology.rank, world), 60) if world > 1 else None
    watchdog = Watchdog(config, topology, marker, store)
    watchdog.post_heartbeat()  # before any work, so that a rank that is stopped at once can be named
    watchdog.start()
    try:
        yield
        if store is not None:
            store.post(f"done/{topology.rank}", {})
    except Exception as error:
        watchdog.stop()
        if store is not None:
            output, linger = Path(config.train.output), watchdog.interval + 0.5
            explain_failure(error, store, watchdog.position(), output, linger)
        raise
    finally:
        watchdog.stop()


def limits(config: Config) -> tuple[float, float]:
    """Seconds without progress that are allowed: usually, and in tasks that may take long.

    Both are below the timeout of collectives, whose error names no rank. Infinite where
    train.watchdog_timeout is 0.
    """
    timeout, chosen = config.parallel.timeout, config.train.watchdog_timeout
    if chosen == 0:
        return float("inf"), float("inf")
    usual = timeout / 2 if chosen is None else chosen
    return usual, max(usual, 0.9 * timeout)


class Watchdog(threading.Thread):
    """The thread. It only reads the main thread's mark and uses the status store."""

    def __init__(
        self, config: Config, topology: Topology, marker: ProgressMarker, store: StatusStore | None
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.topology, self.marker, self.store = topology, marker, store
        self.usual, self.patient = limits(config)
        self.output = Path(config.train.output)
        self.interval = min(5.0, self.usual / 8)
        self.ended = threading.Event()
        # Since when this process runs without a pause, and the time of the neighbour's latest heartbeat.
        self.resumed = self.heartbeat_seen = time.monotonic()
        self.heartbeat: dict[str, Any] | None = None  # that heartbeat
        self.stderr = os.dup(2)  # importing a library may redirect descriptor 2

    def stop(self) -> None:
        """End the thread; further calls do nothing."""
        self.ended.set()

    def post_heartbeat(self) -> None:
        """Post that this rank is alive, and where it is."""
        if self.store is not None:
            status = asdict(self._status()) | {"seconds": time.time()}
            self.store.post(f"heartbeat/{self.topology.rank}", status)

    def run(self) -> None:
        """Check progress and post a heartbeat several times within the allowed seconds."""
        try:
            self._watch()
        finally:
            os.close(self.stderr)

    def _watch(self) -> None:
        checked = time.monotonic()
        while not self.ended.wait(self.interval):
            moment = time.monotonic()
            if moment - checked > 3 * self.interval + 1:
                self.resumed = moment  # the whole process was suspended, which is no hang
            checked = moment
            if self.store is not None and self._peers_ended(self.store):
                return
            limit = self.patient if self.marker.mark.patient else self.usual
            if self._age(self.marker.mark.since) > limit:
                self._end_hung(limit)

    def position(self) -> str:
        """Where the main thread is: stage, step and phase, as text."""
        stage = self._stage(self.marker.mark)
        return f"{'' if stage is None else f'stage {stage}, '}{self.marker.mark}"

    def _age(self, since: float) -> float:
        return time.monotonic() - max(since, self.resumed)

    def _stage(self, mark: Mark) -> int | None:
        if self.topology.pipeline == 1:
            return None
        return self.topology.pipeline_rank if mark.stage is None else mark.stage

    def _peers_ended(self, store: StatusStore) -> bool:
        """Post a heartbeat and read the other ranks' messages; True where this thread is to end."""
        rank, world = self.topology.rank, self.topology.world
        self.post_heartbeat()
        if (hung := store.read("hung")) is not None:
            self._end_hung(hung["limit"])
        # A stopped rank posts nothing. The usual limit holds in any task: this thread never takes long.
        neighbour = (rank + 1) % world
        heartbeat = store.read(f"heartbeat/{neighbour}")
        if heartbeat != self.heartbeat or store.lost:
            self.heartbeat, self.heartbeat_seen = heartbeat, time.monotonic()
        elif self._age(self.heartbeat_seen) > self.usual and store.read(f"done/{neighbour}") is None:
            self._end_hung(self.usual)
        failed = store.read(FAILED)
        if failed is None:
            return False
        if not self.ended.wait(FAILURE_GRACE):  # the main thread has not noticed
            line = f"stopped in {self.position()} because rank {failed['rank']} failed first: "
            self._print(f"mlm-train: [rank {self.topology.rank}] {line}{escaped(failed['error'])}")
            self._exit(1)
        return True

    def _status(self) -> RankStatus:
        mark = self.marker.mark
        return RankStatus(
            self.topology.rank, socket.gethostname(), self._stage(mark), str(mark), self._age(mark.since)
        )

    def _end_hung(self, limit: float) -> None:
        """Post where this rank is, and exit; the first rank to do so collects all statuses and reports."""
        rank, store = self.topology.rank, self.store
        stack, record = main_thread(), with_timeout(flight_record, 5)
        status = replace(self._status(), pending=pending(record), **stack._asdict())
        claim: dict[str, Any] = {"rank": rank, "limit": limit, "when": now()}
        first = store.claim("hung", claim) if store is not None else claim
        folder = folder_of(self.output, first["when"])
        with_timeout(lambda: write_evidence(folder, rank, status.line(), record), 5)
        wait = 2 * self.interval + 2
        if store is not None:
            store.post(f"status/{rank}", asdict(status))
            if first["rank"] != rank and store.wait_for("reported", wait + 5) is not None:
                self._exit(HUNG)
        statuses = self._collect(status, wait)
        ending = f"all ranks end with exit code {HUNG}; stacks of all threads: {folder}"
        report = hang_report(statuses, first["limit"], ending)
        self._print(report)
        with_timeout(lambda: (folder / "report.txt").write_text(f"{report}\n", encoding="utf-8"), 5)
        if store is not None:
            store.post("reported", {})
            time.sleep(1.0)  # the store may end with this process: let the others read it
        self._exit(HUNG)

    def _collect(self, own: RankStatus, seconds: float) -> list[RankStatus]:
        """The status of every rank, in order; of one that posts none within `seconds` its last heartbeat."""
        if self.store is None or self.store.lost:
            return [own]
        end = time.monotonic() + seconds
        statuses = []
        for rank in range(self.topology.world):
            message = self.store.wait_for(f"status/{rank}", max(0.0, end - time.monotonic()))
            if message is None and rank != own.rank:
                none = asdict(RankStatus(rank, "?", None, "", -math.inf))
                message = self.store.read(f"heartbeat/{rank}") or none
                message |= {"responds": False, "seconds": time.time() - message["seconds"]}
            statuses.append(own if message is None else RankStatus(**message))
        return statuses

    def _print(self, text: str) -> None:
        """Write to the descriptor itself: the main thread may hold the lock of sys.stderr."""
        with contextlib.suppress(OSError):
            os.write(self.stderr, f"{text}\n".encode())

    def _exit(self, code: int) -> None:
        """Exit at once: a stuck main thread cannot be unwound."""
        with_timeout(lambda: (sys.stdout.flush(), sys.stderr.flush()), 2)
        os._exit(code)
