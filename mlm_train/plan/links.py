"""Measure the links between ranks, and the duration of calls."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from mlm_train.parallel.runtime import Runtime

BYTES, FP32 = 2**22, 4  # bytes of the measured tensor, and of its elements
REPEATS = 3


def measure_links(runtime: Runtime) -> tuple[float, float]:
    """Bytes per second of an all-reduce between tensor ranks and an all-to-all between data-parallel ranks.

    Every rank calls it. Infinite for a group of one rank.
    """
    topology, payload = runtime.topology, torch.zeros(BYTES // FP32, device=runtime.device)
    groups = (
        (topology.tensor, runtime.groups.tensor, dist.all_reduce),
        (topology.data, runtime.groups.data, _all_to_all),
    )
    speeds = []
    for size, group, collective in groups:
        if size == 1:
            speeds.append(float("inf"))
            continue
        seconds = median_seconds(partial(collective, payload, group=group), runtime.device)
        speeds.append(BYTES / statistics.fmean(runtime.gather(partial(float, seconds))))
    return speeds[0], speeds[1]


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
