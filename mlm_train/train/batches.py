"""The micro-batches of a rank: its shard of each global batch, for any data-parallel size."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mlm_train.model.loss import IGNORED
from mlm_train.parallel.health.thread_stacks import AWAITED
from mlm_train.parallel.mesh.topology import Topology

if TYPE_CHECKING:
    from mlm_train.data.samples import Samples


class MicroBatch(NamedTuple):
    """ids and labels, int64 [micro_batch, sequence]; label -100 is ignored."""

    ids: Tensor
    labels: Tensor


Key = tuple[int, int]  # of a step: its first sample, and its number of samples


def step_batches(
    samples: "Samples", cursor: int, global_batch: int, micro_batch: int, topology: Topology
) -> list[MicroBatch]:
    """This rank's micro-batches of the step that consumes samples cursor .. cursor + global_batch - 1.

    Micro-batches are dealt to the data-parallel ranks in turn, so the step's samples depend only on the
    cursor.
    """
    stride = micro_batch * topology.data
    first = cursor + topology.data_rank * micro_batch
    return [
        MicroBatch(*samples.batch(start, micro_batch))
        for start in range(first, cursor + global_batch, stride)
    ]


def pinned(batches: list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """The batches in pinned memory, for asynchronous copies to a GPU; unchanged on a CPU."""
    if device.type != "cuda":
        return batches
    with torch.cuda.device(device):  # a new thread's default device is the first GPU
        return [MicroBatch(*(tensor.pin_memory() for tensor in batch)) for batch in batches]


Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """Reads the next step's batches in a background thread while the current step runs.

    `take(key)` always returns make(key); batches prefetched for another key are dropped. Only one call of
    `make` runs at a time, so `make` may keep state (a sample order).
    """

    def __init__(self, make: Callable[[Key], Made]) -> None:
        self.make, self.thread = make, ThreadPoolExecutor(1, f"{AWAITED}-data")
        self.key: Key | None = None
        self.pending: Future[Made] | None = None

    def take(self, key: Key, then: Key | None) -> Made:
        """Return make(key), and start make(then) in the background unless `then` is None.

        Raises what make(key) raises.
        """
        if self.pending is None or key != self.key:
            self.pending = self.thread.submit(self.make, key)
        batches = self.pending.result()
        self.key, self.pending = then, None if then is None else self.thread.submit(self.make, then)
        return batches

    def drain(self) -> None:
        """Wait for what runs in the background, before process groups that it uses are destroyed."""
        if self.pending is not None:
            self.pending.exception()


def evaluation_batches(
    samples: "Samples", count: int, micro_batch: int, topology: Topology
) -> tuple[list[MicroBatch], list[int]]:
    """This rank's micro-batches of `count` fixed samples spread evenly over a split.

    Each micro-batch is from one source, whose index is in the second list. Every rank gets the same number of
    micro-batches, all of the same shape, padded with label -100.
    """
    source_of = samples.sources_of(count)
    shards: list[tuple[int, np.ndarray]] = []  # source, indices of its samples
    for source in np.unique(source_of).tolist():
        mine = np.flatnonzero(source_of == source)
        shards += [(source, mine[start : start + micro_batch]) for start in range(0, len(mine), micro_batch)]
    shards += [(0, np.empty(0, dtype=np.int64))] * (-len(shards) % topology.data)
    batches, sources = [], []
    for source, present in shards[topology.data_rank :: topology.data]:
        ids = torch.zeros(micro_batch, samples.sequence_length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        if len(present):
            ids[: len(present)], labels[: len(present)] = samples.spread(present, count)
        batches.append(MicroBatch(ids, labels))
        sources.append(source)
    return batches, sources
