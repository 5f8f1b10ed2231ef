"""A thread on every rank that reports a main thread without progress, and ends the run.

The threads know of each other by peers.py. The first one that finds its main thread stuck, or misses another
rank, collects the status of all ranks and prints one report for the whole run. Then every rank exits with
code HUNG.
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
from mlm_train.parallel.health.failures import explain_failure, folder_of, now
from mlm_train.parallel.health.hang_report import RankStatus, hang_report
from mlm_train.parallel.health.inquiry import Inquiry
from mlm_train.parallel.health.peers import HUNG_EVENT, POLL, Peers, Silence
from mlm_train.parallel.health.progress_marker import Mark, ProgressMarker
from mlm_train.parallel.health.speaker import Speaker
from mlm_train.parallel.health.status_store import Message, with_timeout
from mlm_train.parallel.health.thread_stacks import flight_record, main_thread, pending, write_evidence
from mlm_train.parallel.mesh.topology import Topology

FAILURE_GRACE = 10.0  # seconds for a main thread to notice that another rank has failed
SHOWN = 3  # pending operations that a report shows
READ_SECONDS = 2.0  # how long the process that may hold the store lets the others read its last words


@contextlib.contextmanager
def watched(config: Config, topology: Topology, marker: ProgressMarker) -> Iterator[None]:
    """Watch the body on this rank, and decide whose failure is shown. Every rank calls it.

    Raises PeerFailure instead of an error that another rank's failure has caused.
    """
    peers = with_timeout(lambda: Peers.here(topology), 60) if topology.world > 1 else None
    watchdog = Watchdog(config, topology, marker, peers)
    watchdog.post_heartbeat()  # before any work, so that a rank that is stopped at once can be named
    watchdog.start()
    done = False
    try:
        yield
        done = True
    except Exception as error:
        marker.linger()  # what follows takes seconds
        if peers is not None:
            explain_failure(error, peers, watchdog.position(), Path(config.train.output), READ_SECONDS)
        raise
    finally:
        watchdog.stop()
        watchdog.leave(done)


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
    """The thread. It only reads the main thread's mark, and never waits for another node."""

    def __init__(
        self, config: Config, topology: Topology, marker: ProgressMarker, peers: Peers | None
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.topology, self.marker, self.peers = topology, marker, peers
        self.usual, self.patient = limits(config)
        self.output = Path(config.train.output)
        self.interval = min(5.0, self.usual / 8)
        self.silence = Silence(self.interval)
        self.due = 0.0  # when the next heartbeat is
        self.speaker: Speaker | None = None
        self.ended = threading.Event()
        self.stderr = os.dup(2)  # importing a library may redirect descriptor 2

    def stop(self) -> None:
        """End the thread; further calls do nothing."""
        self.ended.set()

    def leave(self, done: bool) -> None:
        """Be missed no more where this rank is done, and leave speaking to the next rank of the node."""
        if self.peers is not None:
            self.peers.leave(done)
        if self.speaker is not None:
            self.speaker.stop()

    def post_heartbeat(self) -> None:
        """Post that this rank is alive, and where it is."""
        if self.peers is not None:
            self.peers.post(asdict(self._status()) | {"seconds": time.time()})

    def run(self) -> None:
        """Check progress and post a heartbeat several times within the allowed seconds."""
        try:
            self._watch()
        finally:
            os.close(self.stderr)

    def _watch(self) -> None:
        while not self.ended.wait(min(POLL, self.interval)):
            if (event := self.look()) is not None:
                self.end(event)
                return

    def look(self) -> Message | None:
        """What the thread does several times per second. Returns the event that ends the run, if any."""
        event = self.peers.event() if self.peers is not None else None
        if event is not None or time.monotonic() < self.due:
            return event
        self.due = time.monotonic() + self.interval
        self.silence.tick()
        self.post_heartbeat()
        limit = self.patient if self.marker.mark.patient else self.usual
        if self.silence.age(self.marker.mark.since) > limit:
            return self._claim_hang(limit)
        if self.peers is not None and self._misses_a_rank(self.peers):
            return self._claim_hang(self.usual)
        return None

    def _misses_a_rank(self, peers: Peers) -> bool:
        """Whether a rank of this node is silent. Begins to speak for the node where it is this one's turn."""
        messages = peers.messages()
        speaks = self.speaker is not None and self.speaker.is_alive()
        if not speaks and not peers.store.lost and peers.is_speaker(messages):
            self.speaker = Speaker(peers, self.interval, self.usual)
            self.speaker.start()
        # A stopped rank posts nothing. The usual limit holds in any task: this thread never takes long.
        return any(
            self.silence.of(str(rank), message) > self.usual and not message["done"]
            for rank, message in messages.items()
            if message is not None and rank != peers.rank
        )

    def position(self) -> str:
        """Where the main thread is: stage, step and phase, as text."""
        stage = self._stage(self.marker.mark)
        return f"{'' if stage is None else f'stage {stage}, '}{self.marker.mark}"

    def _stage(self, mark: Mark) -> int | None:
        if self.topology.pipeline == 1:
            return None
        return self.topology.pipeline_rank if mark.stage is None else mark.stage

    def _status(self) -> RankStatus:
        mark = self.marker.mark
        age = self.silence.age(mark.since)
        return RankStatus(self.topology.rank, socket.gethostname(), self._stage(mark), str(mark), age)

    def _claim_hang(self, limit: float) -> Message:
        """Have the run end as hung, unless it ends by something else. Returns the event."""
        claim = {"kind": HUNG_EVENT, "rank": self.topology.rank, "limit": limit, "when": now()}
        return claim if self.peers is None else self.peers.claim(claim)

    def end(self, event: Message) -> None:
        """End this rank by the event that ends the run."""
        if event["kind"] == HUNG_EVENT:
            self._end_hung(event)
        elif not self.ended.wait(FAILURE_GRACE):  # the main thread has not noticed
            line = f"stopped in {self.position()} because rank {event['rank']} failed first: "
            self._print(f"mlm-train: [rank {self.topology.rank}] {line}{escaped(event['error'])}")
            self._exit(1)

    def post_status(self) -> tuple[RankStatus, dict[str, Any] | None]:
        """Post where this rank is in full. Returns that, and its flight record."""
        stack, record = main_thread(), with_timeout(flight_record, 5)
        status = replace(self._status(), pending=pending(record)[:SHOWN], **stack._asdict())
        if self.peers is not None:
            self.peers.post(asdict(status), hung=True)
        return status, record

    def _end_hung(self, event: Message) -> None:
        """Post where this rank is, and exit; the rank of the event collects all statuses and reports."""
        rank, peers = self.topology.rank, self.peers
        status, record = self.post_status()
        inquiry = None if peers is None else Inquiry(peers)
        if inquiry is not None:
            inquiry.pass_on()
        folder = folder_of(self.output, event["when"])
        files = folder / (f"rank-{rank:05}" if peers is None else peers.name)
        with_timeout(lambda: write_evidence(files, rank, status.line(), record), 5)
        wait = 2 * self.interval + 2
        if inquiry is None:
            self._report([status], event["limit"], folder)
        elif self._is_reporter(event, inquiry, wait + 5):
            self._report(_statuses(inquiry, wait), event["limit"], folder)
            inquiry.end()
            time.sleep(READ_SECONDS)
        elif inquiry.peers.store.hosted_here:
            time.sleep(READ_SECONDS)  # let the others read that there is a report
        self._exit(HUNG)

    def _is_reporter(self, event: Message, inquiry: Inquiry, seconds: float) -> bool:
        """Whether this rank is to report; otherwise another one has, or had so many seconds for it."""
        if event["rank"] == self.topology.rank:
            return True
        if inquiry.wait_for_report(seconds):
            return False
        if inquiry.takes_over():
            return True
        inquiry.wait_for_report(seconds)
        return False

    def _report(self, statuses: list[RankStatus], limit: float, folder: Path) -> None:
        ending = f"all ranks end with exit code {HUNG}; stacks of all threads: {folder}"
        report = hang_report(statuses, limit, ending)
        self._print(report)
        with_timeout(lambda: (folder / "report.txt").write_text(f"{report}\n", encoding="utf-8"), 5)

    def _print(self, text: str) -> None:
        """Write to the descriptor itself: the main thread may hold the lock of sys.stderr."""
        with contextlib.suppress(OSError):
            os.write(self.stderr, f"{text}\n".encode())

    def _exit(self, code: int) -> None:
        """Exit at once: a stuck main thread cannot be unwound."""
        with_timeout(lambda: (sys.stdout.flush(), sys.stderr.flush()), 2)
        os._exit(code)


def _statuses(inquiry: Inquiry, seconds: float) -> list[RankStatus]:
    """The status of every rank, in order; of one that posts none within `seconds` its last heartbeat.

    Where the store is lost, those of this node.
    """
    found = inquiry.collect(seconds)
    peers = inquiry.peers
    asked = peers.members if peers.store.lost else range(peers.world)
    missing = [rank for rank in asked if rank not in found]
    statuses = {rank: RankStatus(**message) for rank, message in found.items()}
    heartbeats = inquiry.heartbeats(missing)
    for rank in missing:
        message = heartbeats.get(rank) or asdict(RankStatus(rank, "?", None, "", -math.inf))
        silent = time.time() - message["seconds"]
        statuses[rank] = RankStatus(**message | {"responds": False, "seconds": silent})
    return [statuses[rank] for rank in sorted(statuses)]
