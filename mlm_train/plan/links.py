"""Measure the links between ranks, and the duration of calls."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mlm_train.parallel.runtime import Runtime

BYTES, FP32 = (2**16, 2**22), 4  # bytes of the measured tensors, and of their elements
REPEATS = 3


class Link(NamedTuple):
    """Seconds before a collective's first byte, and bytes per second then."""

    latency: float = 0.0
    bandwidth: float = float("inf")


def measure_links(runtime: Runtime) -> tuple[Link, Link]:
    """An all-reduce between tensor ranks, and an all-to-all between data-parallel ranks.

    Every rank calls it. A group of one rank takes no time. Fitted on two sizes.
    """
    topology = runtime.topology
    groups = (
        (topology.tensor, runtime.groups.tensor, dist.all_reduce),
        (topology.data, runtime.groups.data, _all_to_all),
    )
    links = []
    for size, group, collective in groups:
        if size == 1:
            links.append(Link())
            continue
        short, long = (_mean_seconds(partial(collective, group=group), count, runtime) for count in BYTES)
        few, many = BYTES
        # Noise may invert the two: then all of it is bandwidth.
        byte = (long - short) / (many - few) if long > short else long / many
        links.append(Link(max(short - few * byte, 0.0), 1 / byte))
    return links[0], links[1]


def _mean_seconds(collective: Callable[[torch.Tensor], object], count: int, runtime: Runtime) -> float:
    """Seconds of a collective of `count` bytes per rank, the mean over ranks."""
    payload = torch.zeros(count // FP32, device=runtime.device)
    seconds = median_seconds(partial(collective, payload), runtime.device)
    return statistics.fmean(runtime.gather(partial(float, seconds)))


def _all_to_all(payload: torch.Tensor, group: Any) -> None:
    whole = payload[: len(payload) // dist.get_world_size(group) * dist.get_world_size(group)]
    dist.all_to_all_single(torch.empty_like(whole), whole, group=group)


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, after a warm-up call."""
    times = []
    for _ in range(REPEATS + 2):
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter())
        work()
    return statistics.median([after - before for before, after in pairwise(times)][1:])
