"""The thread by which a node speaks with the others: one rank of it has one."""

import itertools
import threading

from mlm_train.parallel.health.failures import now
from mlm_train.parallel.health.peers import EVENT, HUNG_EVENT, NODES, Peers, Silence
from mlm_train.parallel.health.status_store import Message

JOIN_SECONDS = 2.0
_NUMBERS = itertools.count()


class Speaker(threading.Thread):
    """Posts the node's heartbeats and watches the next node's. A second thread waits for the event."""

    def __init__(self, peers: Peers, interval: float, limit: float) -> None:
        super().__init__(name="speaker", daemon=True)
        self.peers, self.interval, self.limit = peers, interval, limit
        self.ended = threading.Event()
        self.silence = Silence(interval)
        # Where the event wakes the listener; nothing where it is to end. A rank's next speaker has another.
        self.wake = f"wake/{peers.rank}/{next(_NUMBERS)}"
        self.listener = threading.Thread(target=self._listen, name="listener", daemon=True)

    def start(self) -> None:
        """Start both threads."""
        self.listener.start()
        super().start()

    def stop(self) -> None:
        """End both threads: one that is in torch while Python ends would abort the process."""
        self.ended.set()
        self.peers.store.post(self.wake, {})
        for thread in (self, self.listener):
            thread.join(JOIN_SECONDS)

    def _listen(self) -> None:
        event = self.peers.store.wait_for(self.wake)
        if event:
            self.peers.learn(event)

    def run(self) -> None:
        """Speak until this is not the node's first rank any more, the run ends or the store is lost."""
        peers, store = self.peers, self.peers.store
        introduction = {"key": peers.key, "ranks": peers.members, "wake": self.wake}
        for number in itertools.count():
            self.silence.tick()
            messages = peers.messages()
            if not peers.is_speaker(messages):  # one that has started later, and goes on
                store.post(self.wake, {})
                return
            ranks = [message["status"] for message in messages.values() if message is not None]
            store.post(peers.key, {"ranks": ranks})
            if number == 0:
                store.add_line(NODES, introduction)  # its heartbeat is there
            # Who claimed the event may not have lived to wake the speakers, or one that has come since.
            if event := store.read(EVENT):
                peers.learn(event)
                return
            if self._is_missed(messages):
                peers.claim({"kind": HUNG_EVENT, "rank": peers.rank, "limit": self.limit, "when": now()})
                return
            if self.ended.wait(self.interval) or store.lost or peers.event() is not None:
                return

    def _is_missed(self, messages: dict[int, Message | None]) -> bool:
        """Whether no heartbeat has come for `limit` seconds from the next node, or from a rank that is to
        share the board and may speak for itself.
        """
        peers, store = self.peers, self.peers.store
        keys = [f"apart/{rank}" for rank, message in messages.items() if message is None]
        if peers.following != peers.key:
            keys.append(peers.following)
        for key in keys:
            silent = self.silence.of(key, store.read(key)) > self.limit and not store.lost
            if silent and store.read(f"done/{key}") is None:
                return True
        return False
