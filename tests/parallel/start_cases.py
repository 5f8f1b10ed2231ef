"""What the ranks of tests/parallel/test_start.py run."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mlm_train.errors import UserError
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.mesh.exchange import largest
from tests.parallel.reference import tiny_config


def _sockets() -> int:
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(str(link).startswith("socket:") for link in links)


def start(model: dict) -> dict[str, Any]:
    """Sockets that a rank has after its groups were made, and after a step's kinds of messages."""
    before = _sockets()
    runtime = processes.start(tiny_config(model, train={"global_batch_size": 10}))
    opened = _sockets() - before
    rank, groups = runtime.topology.rank, runtime.groups
    values = [
        largest((rank * 3 + shift) % runtime.topology.world, None, runtime.device) for shift in range(7)
    ]
    seen: list[int] = []

    def work(failing: int | None) -> Iterator[None]:
        for number in range(3):
            seen.append(number)
            if failing == rank and number == 1:
                raise UserError("the second file is gone")
            yield

    runtime.in_rounds("read", work(None))
    errors = ""
    try:
        runtime.in_rounds("read again", work(2))
    except UserError as error:
        errors = str(error)
    of_ranks: list[Any] = [None] * runtime.topology.world
    dist.all_gather_object(of_ranks, (opened, values, errors, seen[:3]))
    return {
        "lazy": os.environ["TORCH_GLOO_LAZY_INIT"],
        "opened": [outcome[0] for outcome in of_ranks],
        "values": [outcome[1] for outcome in of_ranks],
        "errors": [outcome[2] for outcome in of_ranks],
        "seen": [outcome[3] for outcome in of_ranks],
        "unused": [axis for axis in ("model", "embedding", "stage") if getattr(groups, axis) is None],
        "ahead": groups.data_cpu.ahead is not None,
    }
