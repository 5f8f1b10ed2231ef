"""Which samples a rank trains on: a share of each global batch, whatever the data-parallel size."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mlm_train.model.loss import IGNORED
from mlm_train.parallel.topology import Topology

if TYPE_CHECKING:
    from mlm_train.data.samples import Samples


class MicroBatch(NamedTuple):
    """ids and labels, int64 [micro_batch, sequence]; label -100 is ignored."""

    ids: Tensor
    labels: Tensor


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


def evaluation_batches(
    samples: "Samples", count: int, micro_batch: int, topology: Topology
) -> list[MicroBatch]:
    """This rank's share of the first `count` samples; every rank gets as many, of one shape.

    What is missing in the last ones is padded with label -100.
    """
    stride = micro_batch * topology.data
    batches = []
    for start in range(topology.data_rank * micro_batch, -(-count // stride) * stride, stride):
        present = min(micro_batch, max(0, count - start))
        ids = torch.zeros(micro_batch, samples.sequence_length, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        if present:
            ids[:present], labels[:present] = samples.batch(start, present)
        batches.append(MicroBatch(ids, labels))
    return batches
