"""What memory.mode=auto measures before a run: FFN-M at the model's shape, a lookup, the links between ranks.

A fraction of a second for models that train in seconds a step; every rank measures at once, as it will
train, and all use the mean.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from mlm_train.config import Config
from mlm_train.memory.rows import add_rows
from mlm_train.model.feedforward import SwiGLU
from mlm_train.parallel.runtime import Runtime
from mlm_train.plan.ffn_m import FP32, Speeds

ROWS = (256, 2048)  # a line through two sizes: what a call costs, and what a row
LINK_BYTES = 2**22
REPEATS = 3


def measure_speeds(config: Config, runtime: Runtime) -> Speeds:
    """Every rank calls it; the ranks' mean."""
    found = runtime.together(lambda: _measure(config, runtime.device))
    tensor_link, data_link = _links(runtime)
    means = {name: statistics.fmean(speeds[name] for speeds in found) for name in found[0]}
    return Speeds(**means, tensor_link=tensor_link, data_link=data_link)


def _measure(config: Config, device: torch.device) -> dict[str, float]:
    """Speeds without the links."""
    hidden = config.model.hidden_size
    keys = -(-config.model.intermediate_size // config.parallel.tensor)
    ffn = SwiGLU(hidden, keys).to(device)
    bf16 = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16")
    rows = {count: torch.randn(count, hidden, device=device, requires_grad=True) for count in ROWS}

    def forward(count: int) -> None:
        with torch.no_grad(), bf16:
            ffn(rows[count])

    def both(count: int) -> None:
        with bf16:
            out = ffn(rows[count])
        out.backward(torch.ones_like(out))

    forward_start, forward_row = _line(forward, device)
    pass_start, pass_row = _line(both, device)
    return {
        "forward_start": forward_start,
        "forward_row": forward_row,
        "pass_start": pass_start,
        "pass_row": pass_row,
        "lookup": _lookup(hidden, device),
        "sort": _sort(config, device),
    }


def _line(work: Callable[[int], None], device: torch.device) -> tuple[float, float]:
    """Seconds of a call and of a row, through two measurements; neither below zero."""
    few, many = ROWS
    short, long = (_seconds(partial(work, count), device) for count in ROWS)
    row = max((long - short) / (many - few), 0.0)
    return max(short - few * row, 0.0), row


def _lookup(hidden: int, device: torch.device) -> float:
    """Seconds of a position: its row read, the row's gradient added."""
    positions, table = ROWS[1], torch.randn(ROWS[1], hidden, device=device)
    index = torch.randint(0, len(table), (positions,), device=device)

    def work() -> None:
        add_rows(table, index, table[index])

    return _seconds(work, device) / positions


def _sort(config: Config, device: torch.device) -> float:
    """Seconds of a token among the distinct ids."""
    ids = torch.randint(0, config.model.vocab_size, (ROWS[1],), device=device)
    return _seconds(lambda: ids.unique(return_inverse=True), device) / len(ids)


def _links(runtime: Runtime) -> tuple[float, float]:
    """Bytes a second of an all-reduce between tensor ranks and an all-to-all between data-parallel ranks."""
    from megatron.core import parallel_state

    topology, payload = runtime.topology, torch.zeros(LINK_BYTES // FP32, device=runtime.device)
    groups = (
        (topology.tensor, parallel_state.get_tensor_model_parallel_group(), dist.all_reduce),
        (topology.data, parallel_state.get_data_parallel_group(), _all_to_all),
    )
    found = []
    for size, group, collective in groups:
        if size == 1:
            found.append(float("inf"))
            continue
        taken = _seconds(partial(collective, payload, group=group), runtime.device)
        found.append(LINK_BYTES / statistics.fmean(runtime.together(partial(float, taken))))
    return found[0], found[1]


def _all_to_all(payload: torch.Tensor, group: Any) -> None:
    whole = payload[: len(payload) // dist.get_world_size(group) * dist.get_world_size(group)]
    dist.all_to_all_single(torch.empty_like(whole), whole, group=group)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, after one that is not counted."""
    marks = []
    for _ in range(REPEATS + 2):
        if device.type != "cpu":
            torch.accelerator.synchronize()
        marks.append(time.perf_counter())
        work()
    return statistics.median([after - before for before, after in pairwise(marks)][1:])
