"""The ranks' notice board: what they tell each other beside the collectives, which may be stuck."""

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")


def bounded(work: Callable[[], Answer], seconds: float) -> Answer | None:
    """The result of `work`, or None where it fails or takes longer: a store or disk may hang too."""
    answers: list[Answer] = []

    def attempt() -> None:
        try:
            answers.append(work())
        except Exception:
            return  # whoever asks can only go on without an answer

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


class StatusStore:
    """Notes by key in the job's store, over a connection of our own: the main thread's may be in use.

    Nothing here raises or waits for long. Once the store does not answer, the board is `lost`, and what
    was read before is what is known.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.lost = False
        self.known: dict[str, dict[str, Any]] = {}
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        self.hosted_here = rank == 0 and not agent  # the store ends with this process
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timeout=timedelta(seconds=10),
            wait_for_workers=False,
        )
        # The agent's store outlives the ranks, who read no old notes; machines count restarts differently,
        # but share it only where none may join.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0"
        self.store = dist.PrefixStore(f"mlm_train/{attempt}", store)

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        if self.lost:
            return None
        answer = bounded(lambda: (question(),), seconds=10)
        self.lost = answer is None
        return answer[0] if answer is not None else None

    def post(self, key: str, note: dict[str, Any]) -> None:
        """Leave a note for all."""
        self._ask(lambda: self.store.set(key, json.dumps(note)))

    def read(self, key: str) -> dict[str, Any] | None:
        """The note, if there is one."""
        note = self._ask(lambda: json.loads(self.store.get(key)) if self.store.check([key]) else None)
        if note is not None:
            self.known[key] = note
        return self.known.get(key)

    def claim(self, key: str, note: dict[str, Any]) -> dict[str, Any]:
        """Leave a note that only the first rank can leave; that rank's. Ours, where the board is lost."""
        first = self._ask(lambda: json.loads(self.store.compare_set(key, "", json.dumps(note))))
        return self.known.get(key, note) if first is None else first

    def await_note(self, key: str, seconds: float) -> dict[str, Any] | None:
        """The note, waited for that long."""
        end = time.monotonic() + seconds
        while (note := self.read(key)) is None and not self.lost and time.monotonic() < end:
            time.sleep(0.05)
        return note
