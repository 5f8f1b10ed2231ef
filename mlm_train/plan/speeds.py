"""Measurements of memory.mode=auto before a run: FFN-M at the model's shape, a lookup, links between ranks.

They take a fraction of a second for models that train in seconds per step. All ranks measure at the same
time, as they will train, and all use the mean.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch

from mlm_train.config import Config
from mlm_train.memory.rows import add_rows
from mlm_train.model.feedforward import SwiGLU
from mlm_train.parallel.build import autocast_of
from mlm_train.parallel.runtime import Runtime
from mlm_train.plan.ffn_m import Speeds
from mlm_train.plan.links import measure_links, median_seconds

ROWS = (256, 2048)  # two sizes, for a linear fit of the cost per call and per row
LARGEST = 2**24  # maximum weight elements that ffn_flops measures


def measure_speeds(config: Config, runtime: Runtime) -> Speeds:
    """Measure on every rank, which all call it. Returns the mean over ranks."""
    per_rank = runtime.gather(lambda: _measure(config, runtime.device))
    tensor_link, data_link = measure_links(runtime)
    means = {name: statistics.fmean(speeds[name] for speeds in per_rank) for name in per_rank[0]}
    return Speeds(
        **means,
        tensor_link=tensor_link.bandwidth,
        data_link=data_link.bandwidth,
        tensor_latency=tensor_link.latency,
        data_latency=data_link.latency,
    )


def ffn_flops(hidden: int, keys: int) -> float:
    """FLOPs per second of FFN-M in fp32 on this machine's CPU with all threads, as in a ToL build.

    A large FFN-M is measured with fewer keys, so that it takes about a second.
    """
    keys, rows = min(keys, max(1, LARGEST // hidden)), ROWS[0]
    ffn, x = SwiGLU(hidden, keys).requires_grad_(False), torch.randn(rows, hidden)
    return 6 * hidden * keys * rows / median_seconds(partial(ffn, x), torch.device("cpu"))


def _measure(config: Config, device: torch.device) -> dict[str, float]:
    """The fields of Speeds, without the links."""
    hidden = config.model.hidden_size
    keys = -(-config.model.intermediate_size // config.parallel.tensor)
    ffn = SwiGLU(hidden, keys).to(device)
    precision = autocast_of(config, device)
    rows = {count: torch.randn(count, hidden, device=device, requires_grad=True) for count in ROWS}

    def forward(count: int) -> None:
        with torch.no_grad(), precision:
            ffn(rows[count])

    def both(count: int) -> None:
        with precision:
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
    """Seconds per call and per row, by a linear fit through two measurements; neither is below zero."""
    few, many = ROWS
    short, long = (median_seconds(partial(work, count), device) for count in ROWS)
    row = max((long - short) / (many - few), 0.0)
    return max(short - few * row, 0.0), row


def _lookup(hidden: int, device: torch.device) -> float:
    """Seconds per position: its row read, the row's gradient added."""
    positions, table = ROWS[1], torch.randn(ROWS[1], hidden, device=device)
    index = torch.randint(0, len(table), (positions,), device=device)

    def work() -> None:
        add_rows(table, index, table[index])

    return median_seconds(work, device) / positions


def _sort(config: Config, device: torch.device) -> float:
    """Seconds per token to find the distinct ids."""
    ids = torch.randint(0, config.model.vocab_size, (ROWS[1],), device=device)
    return median_seconds(lambda: ids.unique(return_inverse=True), device) / len(ids)
