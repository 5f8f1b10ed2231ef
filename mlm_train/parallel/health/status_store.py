"""The status store: what nodes tell each other outside the collectives, which may be stuck."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from mlm_train.utils.threads import begun

Result = TypeVar("Result")
Message = dict[str, Any]
MONTH = timedelta(days=20)  # torch waits in milliseconds of 32 bits
PATIENCE = 10.0  # seconds for the store to answer
CONNECT_PATIENCE = 300.0  # for one that nobody waits for
_USES = itertools.count()  # of a store by this process, as many on every rank


def with_timeout(work: Callable[[], Result], seconds: float) -> Result | None:
    """The result of `work`, or None where it fails or takes longer: a store or disk may hang too."""
    attempt = begun(work)
    ended = wait([attempt], seconds).done
    return attempt.result() if ended and attempt.exception() is None else None


class StatusStore:
    """Messages by key in the job's store, over a separate connection: the main thread's may be in use.

    No method raises or blocks for long. Once the store does not respond, `lost` is set, and nothing is read
    but what was read before.
    """

    def __init__(self, prefix: str, hosted_here: bool = False) -> None:
        self.prefix = prefix  # of its keys
        self.hosted_here = hosted_here  # the store ends with this process
        self.lost = False
        self.cache: dict[str, Message] = {}
        self.store = self._connect()

    @classmethod
    def here(cls) -> "StatusStore":
        """That of this process, a rank, as its environment has it."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        # The agent's store outlives the ranks, which must not read messages of an earlier attempt. Nodes
        # count restarts differently, but they share that store only where no other node may join.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0"
        return cls(f"mlm_train/{attempt}/{next(_USES)}", os.environ.get("RANK") == "0" and not agent)

    def _connect(self, patience: float = PATIENCE) -> dist.TCPStore:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timeout=timedelta(seconds=patience),
            wait_for_workers=False,
        )

    def _request(self, operation: Callable[[], Result], seconds: float = PATIENCE) -> Result | None:
        """The operation's result; None where the store is lost."""
        if self.lost:
            return None
        response = with_timeout(lambda: (operation(),), seconds)
        self.lost = response is None
        return response[0] if response is not None else None

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}"

    def post(self, key: str, message: Message) -> None:
        """Store a message for all ranks."""
        self._request(lambda: self.store.set(self._key(key), json.dumps(message)))

    def read(self, key: str) -> Message | None:
        """The message of a key, None where there is none."""

        def get() -> Message | None:
            if key not in self.cache and not self.store.check([self._key(key)]):
                return None  # getting it would wait for it
            found: Message = json.loads(self.store.get(self._key(key)))
            return found

        message = self._request(get)
        if message is not None:
            self.cache[key] = message
        return self.cache.get(key)

    def read_all(self, keys: Sequence[str]) -> list[Message]:
        """The messages of keys that have one, in one request; empty where the store is lost."""
        names = [self._key(key) for key in keys]
        found = self._request(lambda: [json.loads(value) for value in self.store.multi_get(names)])
        return found or []

    def add_line(self, key: str, message: Message) -> None:
        """Add a message to those of a key."""
        line = f"{json.dumps(message)}\n"
        self._request(lambda: self.store.append(self._key(key), line))  # type: ignore[attr-defined]

    def read_lines(self, key: str) -> list[Message]:
        """The messages that were added to a key, in one request; empty without any."""

        def get() -> list[Message]:
            if not self.store.check([self._key(key)]):
                return []
            return [json.loads(line) for line in self.store.get(self._key(key)).splitlines()]

        return self._request(get) or []

    def claim(self, key: str, message: Message) -> Message:
        """Store a message unless a rank has stored one; the stored one. Ours, where the store is lost."""
        text = json.dumps(message)
        first = self._request(lambda: json.loads(self.store.compare_set(self._key(key), "", text)))
        return self.cache.get(key, message) if first is None else first

    def post_all(self, messages: dict[str, Message]) -> None:
        """Store the messages of several keys in one request."""
        names, texts = [self._key(key) for key in messages], [json.dumps(m) for m in messages.values()]
        self._request(lambda: self.store.multi_set(names, texts))  # type: ignore[attr-defined]

    def wait_for(self, key: str) -> Message | None:
        """The message of a key, as soon as there is one; None where the store is lost. Takes a thread."""
        with contextlib.suppress(Exception):
            connection = self._connect(CONNECT_PATIENCE)  # a wait keeps it to itself
            while not self.lost:
                with contextlib.suppress(dist.DistStoreError):  # nothing has come for MONTH
                    connection.wait([self._key(key)], MONTH)
                    found: Message = json.loads(connection.get(self._key(key)))
                    return found
        return None
