"""What the ranks of a run know of each other: heartbeats, the event that ends the run, statuses in a hang.

Ranks of a node share a board. One of them, the speaker, is the node's voice in the status store: it posts the
heartbeats of all, watches those of the next node, and waits for the event. So the store serves nodes, not
ranks, and nobody polls it. A speaker that stops is missed on the board as every rank is, and one that ends is
followed by the next rank.
"""

import os
import threading
import time

from mlm_train.parallel.health.board import Board
from mlm_train.parallel.health.status_store import Message, StatusStore
from mlm_train.parallel.mesh.topology import Topology

EVENT = "event"  # the status store's key of the failure or hang that ends the run
HUNG_EVENT, FAILED_EVENT = "hung", "failed"  # kinds of it
NODES = "nodes"  # its key of the nodes: where their heartbeats are, of which ranks, and who is to be woken
POLL = 0.25  # seconds between looks at the board
LOCK_SECONDS = 3.0  # how long a rank waits for another one of its node that asks the store


class Silence:
    """How long each of some heartbeats has not changed, by this process's clock.

    Time in which the whole process was suspended does not count.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval  # seconds between two calls of tick()
        self.resumed = self.checked = time.monotonic()
        self.seen: dict[str, tuple[Message | None, float]] = {}

    def tick(self) -> None:
        """Notice that this process was suspended."""
        moment = time.monotonic()
        if moment - self.checked > 3 * self.interval + 1:
            self.resumed = moment
        self.checked = moment

    def age(self, since: float) -> float:
        """Seconds since a moment."""
        return time.monotonic() - max(since, self.resumed)

    def of(self, name: str, heartbeat: Message | None) -> float:
        """Seconds since a heartbeat changed, which is this now; None: there is none yet."""
        if name not in self.seen or self.seen[name][0] != heartbeat:
            self.seen[name] = (heartbeat, time.monotonic())
        return self.age(self.seen[name][1])


class Peers:
    """A rank's view of the others. All methods are for any thread and return soon, whatever has failed."""

    def __init__(self, rank: int, world: int, node: range, store: StatusStore) -> None:
        self.rank, self.world, self.node, self.store = rank, world, node, store
        board = Board.shared(store, f"board/{node.start}") if len(node) > 1 else Board.private()
        self.board = board or Board.private()
        # A rank that shares no board with its node speaks for itself. The node's speaker watches it.
        self.members = [rank] if board is None else list(node)
        self.key = f"heartbeat/{node.start}" if board is not None else f"apart/{rank}"
        self.following = f"heartbeat/{node.start if board is None else node.stop % world}"
        self.lock = threading.Lock()
        self.left = False

    @classmethod
    def here(cls, topology: Topology) -> "Peers":
        """Those of this process, as its environment has it: a rank alone where it does not name a node."""
        size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = topology.rank - int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else topology.rank
        return cls(topology.rank, topology.world, range(first, first + size), StatusStore.here())

    @property
    def name(self) -> str:
        """Of this node's files: its ranks."""
        first, last = self.members[0], self.members[-1]
        return f"rank-{first:05}" if first == last else f"ranks-{first:05}-{last:05}"

    def _slot(self, rank: int) -> int:
        return rank - self.node.start

    def post(self, status: Message, hung: bool = False) -> None:
        """Tell the node where this rank is; in a hang, in full."""
        with self.lock:
            if not self.left:
                message = {"status": status, "hung": hung, "speaks": True, "done": False}
                self.board.write(self._slot(self.rank), message)

    def leave(self, done: bool) -> None:
        """Speak no more. done: this rank has ended as it should, and will not be missed."""
        with self.lock:
            before = self.board.read(self._slot(self.rank)) or {"status": {}, "hung": False}
            self.board.write(self._slot(self.rank), before | {"speaks": False, "done": done})
            self.left = True
        if done and all(message is not None and message["done"] for message in self.messages().values()):
            self.store.post(f"done/{self.key}", {})

    def messages(self) -> dict[int, Message | None]:
        """The latest message of each rank of the node; None where it has not come."""
        return {rank: self.board.read(self._slot(rank)) for rank in self.members}

    def is_speaker(self, messages: dict[int, Message | None]) -> bool:
        """Whether this is the first rank of the node that speaks."""
        speaking = (rank for rank, message in messages.items() if message is not None and message["speaks"])
        return next(speaking, None) == self.rank

    def event(self) -> Message | None:
        """The failure or hang that ends the run, once this node knows of it."""
        return self.board.read(self._slot(self.node.stop))

    def learn(self, event: Message) -> None:
        """Tell the node of the event."""
        self.board.write(self._slot(self.node.stop), event)

    def claim(self, event: Message) -> Message:
        """End the run by this event, unless another one ends it; the one that does."""
        with self.board.locked(LOCK_SECONDS):  # one rank of a node asks the store
            first = self.event()
            if first is None:
                first = self.store.claim(EVENT, event)
                self.learn(first)
                if first == event:
                    nodes = self.store.read_lines(NODES)
                    self.store.post_all({node["wake"]: event for node in nodes})
        return first

    def event_within(self, seconds: float) -> Message | None:
        """The event, as soon as this node knows of it; None where none came within `seconds`."""
        end = time.monotonic() + seconds
        while (event := self.event()) is None and time.monotonic() < end:
            time.sleep(POLL / 5)
        return event

    def learn_reported(self) -> None:
        """Tell the node that the report of the hang is written."""
        self.board.write(self._slot(self.node.stop) + 1, {})

    def is_reported(self) -> bool:
        """Whether the node knows that the report is written."""
        return self.board.read(self._slot(self.node.stop) + 1) is not None
