"""What ranks tell and ask in a hang, so that one of them can report where all are."""

import time
from collections.abc import Sequence

from mlm_train.parallel.health.peers import NODES, POLL, Peers
from mlm_train.parallel.health.status_store import Message

REPORTED, STATUSES = "reported", "statuses"  # keys of the status store
FULL = 1.0  # seconds in which the first rank of a node waits for the statuses of all


class Inquiry:
    """What a rank tells and asks in a hang, after it has posted its status."""

    def __init__(self, peers: Peers) -> None:
        self.peers, self.passed = peers, set[int]()
        self.started = time.monotonic()

    def local(self) -> dict[int, Message]:
        """The statuses of the node's ranks that have posted one."""
        messages = self.peers.messages()
        return {rank: m["status"] for rank, m in messages.items() if m is not None and m["hung"]}

    def pass_on(self) -> bool:
        """As the first of the node's ranks that answer: post the statuses of all. Returns whether it is."""
        statuses = self.local()
        if min(statuses, default=None) != self.peers.rank:
            return False
        new = statuses.keys() - self.passed
        whole = len(statuses) == len(self.peers.members) or time.monotonic() > self.started + FULL
        if new and whole:
            self.peers.store.add_line(STATUSES, {"ranks": [statuses[rank] for rank in sorted(new)]})
            self.passed |= new
        return whole

    def wait_for_report(self, seconds: float) -> bool:
        """Whether the report is written within so many seconds."""
        peers, asked = self.peers, time.monotonic()
        end = asked + seconds
        while time.monotonic() < end and not peers.is_reported():
            if self.pass_on() and time.monotonic() > asked + 2 * POLL:
                asked = time.monotonic()
                if peers.store.read(REPORTED) is not None:
                    peers.learn_reported()
            time.sleep(POLL)
        return peers.is_reported()

    def takes_over(self) -> bool:
        """Whether this rank is the one that reports in place of another, which has not."""
        peers = self.peers
        return self.pass_on() and peers.store.claim("successor", {"rank": peers.rank})["rank"] == peers.rank

    def end(self) -> None:
        """Tell all that the report is written."""
        self.peers.learn_reported()
        self.peers.store.post(REPORTED, {})

    def collect(self, seconds: float) -> dict[int, Message]:
        """The statuses of all ranks, by rank, as far as they come within so many seconds."""
        peers, end = self.peers, time.monotonic() + seconds
        found = self.local()
        expected = len(peers.members) if peers.store.lost else peers.world
        while len(found) < expected and time.monotonic() < end:
            self.pass_on()
            for line in peers.store.read_lines(STATUSES):
                found |= {status["rank"]: status for status in line["ranks"]}
            found |= self.local()
            time.sleep(2 * POLL)
        return found

    def heartbeats(self, missing: Sequence[int]) -> dict[int, Message]:
        """The latest heartbeats of ranks that have posted no status, as far as there are any."""
        peers = self.peers
        here = {rank: m["status"] for rank, m in peers.messages().items() if m is not None}
        nodes = peers.store.read_lines(NODES) if set(missing) - here.keys() else []
        keys = [node["key"] for node in nodes if set(node["ranks"]) & set(missing)]
        for message in peers.store.read_all(keys) if keys else []:
            here |= {status["rank"]: status for status in message["ranks"]}
        return {rank: here[rank] for rank in missing if rank in here}
