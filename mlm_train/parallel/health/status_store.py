"""The status store: what ranks tell each other outside the collectives, which may be stuck."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import wait
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from mlm_train.utils.threads import begun

Result = TypeVar("Result")


def with_timeout(work: Callable[[], Result], seconds: float) -> Result | None:
    """The result of `work`, or None where it fails or takes longer: a store or disk may hang too."""
    attempt = begun(work)
    ended = wait([attempt], seconds).done
    return attempt.result() if ended and attempt.exception() is None else None


class StatusStore:
    """Messages by key in the job's store, over a separate connection: the main thread's may be in use.

    No method raises or blocks for long. Once the store does not respond, `lost` is set, and `read` returns
    what it returned before.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.lost = False
        self.cache: dict[str, dict[str, Any]] = {}
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        self.hosted_here = rank == 0 and not agent  # the store ends with this process
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timeout=timedelta(seconds=10),
            wait_for_workers=False,
        )
        # The agent's store outlives the ranks, which must not read messages of an earlier attempt. Nodes
        # count restarts differently, but they share that store only where no other node may join.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0"
        self.store = dist.PrefixStore(f"mlm_train/{attempt}", store)

    def _request(self, operation: Callable[[], Result]) -> Result | None:
        """The operation's result; None where the store is lost."""
        if self.lost:
            return None
        response = with_timeout(lambda: (operation(),), seconds=10)
        self.lost = response is None
        return response[0] if response is not None else None

    def post(self, key: str, message: dict[str, Any]) -> None:
        """Store a message for all ranks."""
        self._request(lambda: self.store.set(key, json.dumps(message)))

    def read(self, key: str) -> dict[str, Any] | None:
        """The message of a key, None where there is none."""
        message = self._request(lambda: json.loads(self.store.get(key)) if self.store.check([key]) else None)
        if message is not None:
            self.cache[key] = message
        return self.cache.get(key)

    def claim(self, key: str, message: dict[str, Any]) -> dict[str, Any]:
        """Store a message unless a rank has stored one; the stored one. Ours, where the store is lost."""
        first = self._request(lambda: json.loads(self.store.compare_set(key, "", json.dumps(message))))
        return self.cache.get(key, message) if first is None else first

    def wait_for(self, key: str, seconds: float) -> dict[str, Any] | None:
        """The message of a key, polled for that long; None where none came."""
        end = time.monotonic() + seconds
        while (message := self.read(key)) is None and not self.lost and time.monotonic() < end:
            time.sleep(0.05)
        return message
