"""Which samples a rank trains on: a share of each global batch, whatever the data-parallel size."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

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


Key = tuple[int, int]  # a step's: the cursor, and how many samples it takes


def step_batches(
    samples: "Samples", cursor: int, global_batch: int, micro_batch: int, topology: Topology
) -> list[MicroBatch]:
    """This rank's micro-batches of the step that takes samples cursor .. cursor+global_batch-1.

    Micro-batches are dealt to the ranks in turn, so the step's set of samples depends on the cursor
    alone.
    """
    stride = micro_batch * topology.data
    first = cursor + topology.data_rank * micro_batch
    return [
        MicroBatch(*samples.batch(start, micro_batch))
        for start in range(first, cursor + global_batch, stride)
    ]


def pinned(batches: list[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """In memory that a GPU copies from while it computes; on a CPU as they are."""
    if device.type != "cuda":
        return batches
    with torch.cuda.device(device):  # a thread's own default is the first GPU
        return [MicroBatch(*(tensor.pin_memory() for tensor in batch)) for batch in batches]


class Prefetcher:
    """What will be needed next, made by a thread while the present is worked on.

    The order is the caller's: `take(key)` is make(key) whatever was made ahead, which is thrown away
    where it was another. One call of `make` runs at a time, so it may keep state (a sample order).
    """

    def __init__(self, make: Callable[[Key], list[MicroBatch]]) -> None:
        self.make, self.thread = make, ThreadPoolExecutor(1, f"{AWAITED}-data")
        self.key: Key | None = None
        self.coming: Future[list[MicroBatch]] | None = None

    def take(self, key: Key, then: Key | None) -> list[MicroBatch]:
        """make(key), and begin make(then): None where nothing will follow. Errors of make(key) are raised."""
        if self.coming is None or key != self.key:
            self.coming = self.thread.submit(self.make, key)
        found = self.coming.result()
        self.key, self.coming = then, None if then is None else self.thread.submit(self.make, then)
        return found


def evaluation_batches(
    samples: "Samples", count: int, micro_batch: int, topology: Topology
) -> tuple[list[MicroBatch], list[int]]:
    """This rank's share of `count` samples spread evenly over a split, always the same ones.

    Each micro-batch is of one source, whose number is in the second list. Every rank gets as many, all of
    one shape; what is missing is padded with label -100.
    """
    source_of = samples.sources_of(count)
    parts: list[tuple[int, np.ndarray]] = []
    for source in np.unique(source_of).tolist():
        mine = np.flatnonzero(source_of == source)
        parts += [(source, mine[start : start + micro_batch]) for start in range(0, len(mine), micro_batch)]
    parts += [(0, np.empty(0, dtype=np.int64))] * (-len(parts) % topology.data)
    batches, sources = [], []
    for source, present in parts[topology.data_rank :: topology.data]:
        ids = torch.zeros(micro_batch, samples.sequence_length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        if len(present):
            ids[: len(present)], labels[: len(present)] = samples.spread(present, count)
        batches.append(MicroBatch(ids, labels))
        sources.append(source)
    return batches, sources
