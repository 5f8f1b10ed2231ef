"""The ranks of a world as threads of one process: each has a rank's own watchdog, speaker and store.

What a rank's threads do is the trainer's code. Of a process they lack its end, the stacks of its threads (all
would write those of the same process) and a main thread: their marks do not move.
"""

import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from mlm_train.config import Config
from mlm_train.parallel.health import watchdog as watching
from mlm_train.parallel.health.peers import POLL, Peers
from mlm_train.parallel.health.progress_marker import ProgressMarker
from mlm_train.parallel.health.status_store import PATIENCE, StatusStore
from mlm_train.parallel.health.thread_stacks import StackPosition
from mlm_train.parallel.health.watchdog import Watchdog
from mlm_train.parallel.mesh.topology import Topology

SHARED = 32  # connections
THREADS = 256  # ranks that have one each in a hang; of more, those that only look at the board have none
WAITS = StackPosition("all_reduce", "torch/distributed/distributed_c10d.py", "mlm_train/train/step.py")


class CountedStore(dist.TCPStore):
    """A connection that notes when it sends a request to the server."""

    def __init__(self, moments: list[float], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.moments = moments

    def _note(self, requests: int) -> None:
        self.moments.extend([time.monotonic()] * requests)

    def set(self, key: str, value: str) -> None:
        self._note(1)
        super().set(key, value)

    def append(self, key: str, value: str) -> None:
        self._note(1)
        super().append(key, value)  # type: ignore[misc]

    def check(self, keys: list[str]) -> bool:
        self._note(1)
        return super().check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._note(1)
        return super().compare_set(key, expected, desired)

    def get(self, key: str) -> bytes:
        self._note(2)  # torch waits for the key first
        return super().get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._note(2)
        return super().multi_get(keys)

    def multi_set(self, keys: list[str], values: list[str]) -> None:
        self._note(1)
        super().multi_set(keys, values)  # type: ignore[misc]

    def wait(self, keys: list[str], timeout: timedelta) -> None:  # type: ignore[override]
        self._note(1)
        try:
            super().wait(keys, timeout)
        except dist.DistStoreError:
            self._note(1)  # takes the request back
            raise


class CountedStatusStore(StatusStore):
    """A rank's status store. Ranks share `connections`; a speaker has one of `waiting`, for its key.

    They are there before time is measured: for each one torch looks up the host's name, on both sides.
    """

    def __init__(self, connections: Iterator[CountedStore], waiting: Iterator[CountedStore]) -> None:
        self.shared, self.unused = next(connections), waiting
        super().__init__("watch")

    def _connect(self, patience: float = PATIENCE) -> dist.TCPStore:
        return self.shared if patience == PATIENCE else next(self.unused)


def connection(port: int, moments: list[float]) -> CountedStore:
    """A counted connection to the store on this machine."""
    options: dict[str, Any] = {"timeout": timedelta(seconds=300), "wait_for_workers": False}
    return CountedStore(moments, "127.0.0.1", port, **options)


class SimulatedWatchdog(Watchdog):
    """A rank's watchdog, of whose process only this thread ends."""

    def __init__(self, config: Config, peers: Peers, reports: list[str], codes: list[int]) -> None:
        topology = Topology(peers.world, peers.rank, 1, 1)
        super().__init__(config, topology, ProgressMarker(), peers)
        self.reports, self.codes = reports, codes

    def _print(self, text: str) -> None:
        self.reports.append(text)

    def _exit(self, code: int) -> None:
        self.codes.append(code)

    def freeze(self) -> None:
        """Do nothing more, as a process that is stopped."""
        self.ended.set()
        if self.speaker is not None:
            self.speaker.ended.set()


def per_second(moments: list[float], start: float, end: float) -> list[int]:
    """How many of the moments lie in each second from start to end."""
    counts = [0] * max(1, int(end - start))
    for moment in moments:
        if start <= moment < start + len(counts):
            counts[int(moment - start)] += 1
    return counts


def _look(watchdog: SimulatedWatchdog, ends: list[threading.Thread], moving: bool) -> bool:
    """Do what a rank's thread does several times per second. Whether that is over."""
    if watchdog.ended.is_set():
        return True
    if moving:
        watchdog.marker.at("forward")
    event, peers = watchdog.look(), watchdog.peers
    if event is None or peers is None:
        return False
    if peers.world <= THREADS or peers.rank == event["rank"] or peers.is_speaker(peers.messages()):
        ends.append(threading.Thread(target=watchdog.end, args=(event,), daemon=True))
        ends[-1].start()
    else:
        watchdog.post_status()
    return True


def simulate(
    port: int, world: int, per_node: int, timeout: float, stopped: Sequence[int], moving: bool
) -> dict[str, Any]:
    """Watch while nobody's main thread moves, or all do with `moving`; some ranks are stopped early.

    One thread looks for all ranks in turn, as often as each rank's own would; in a hang a rank has one.

    Returns the requests of each second, and the report of the hang that follows.
    """
    threading.stack_size(2**18)
    config = Config.model_validate(
        {
            "model": {"kind": "base", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1,
                      "num_attention_heads": 1, "intermediate_size": 8},
            "data": {"path": "none"},
            "train": {"output": os.devnull, "watchdog_timeout": timeout, "steps": 1,
                      "global_batch_size": 1, "micro_batch_size": 1},
        }
    )  # fmt: skip
    moments: list[float] = []
    reports: list[str] = []
    codes: list[int] = []
    ranks = []
    nodes = world // per_node
    connections = itertools.cycle([connection(port, moments) for _ in range(min(SHARED, nodes))])
    waiting = iter([connection(port, moments) for _ in range(nodes)])
    for rank in range(world):
        node = range(rank // per_node * per_node, (rank // per_node + 1) * per_node)
        peers = Peers(rank, world, node, CountedStatusStore(connections, waiting))
        ranks.append(SimulatedWatchdog(config, peers, reports, codes))
    started = len(moments)
    with (
        patch.object(watching, "main_thread", lambda: WAITS),
        patch.object(watching, "flight_record", lambda: None),
        patch.object(watching, "write_evidence", lambda *_: None),
    ):
        begun = time.monotonic()
        for watchdog in ranks:
            watchdog.post_heartbeat()
        for watchdog in ranks:
            watchdog.marker.enter("step 3")
        ends: list[threading.Thread] = []
        running = list(ranks)
        while running:
            if time.monotonic() > begun + timeout / 4:
                for rank in stopped:
                    ranks[rank].freeze()
            running = [watchdog for watchdog in running if not _look(watchdog, ends, moving)]
            time.sleep(POLL)
        for thread in ends:
            thread.join()
    hung = begun + timeout * (5 / 4 if moving else 1)
    steady = per_second(moments, begun + timeout / 4, begun + timeout)
    ended = time.monotonic()
    return {
        "start": started,
        "steady": steady,
        "hang": per_second(moments, hung, ended),
        "report_seconds": ended - hung,
        "report": "\n".join(reports),
        "codes": sorted(set(codes)),
    }
