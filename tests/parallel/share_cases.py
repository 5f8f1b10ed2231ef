"""What the ranks of the test of shared tables run: FFN-M's FLOPs of a step, and bytes exchanged."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mlm_train.bench.traffic import Traffic
from mlm_train.memory import TableSource
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.ffn_m.shares import DataParallelSharing
from tests.parallel.layouts import MODES
from tests.parallel.parity_cases import make_trainer
from tests.parallel.reference import tiny_config

VOCABULARY = 5000


def count_work(modes: list[str]) -> list[list[dict[str, int]]]:
    """By mode and rank: FLOPs of a step's tables, their rows, the step's distinct ids, bytes sent."""
    return [_count(mode) for mode in modes]


def _count(mode: str) -> list[dict[str, int]]:
    parallel = {"zero_stage": 1}  # which exchanges no rows of the embedding
    config = tiny_config({"kind": "memory", "vocab_size": VOCABULARY}, memory=MODES[mode], parallel=parallel)
    runtime = processes.start(config)
    executor: Any = make_trainer(config, runtime).executor
    table: TableSource = executor.source
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (3, 64, 64), generator=generator).amin(0)  # low ids are frequent
    mine = ids.chunk(runtime.topology.data)[runtime.topology.data_rank]
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        executor.channel.begin(executor.channel.plan(mine, 1, ahead=False))
        counts = {"rows": table.rows.count, "distinct": ids.unique().numel()}
        executor.channel.finish()
    counts |= {"flops": flops.get_total_flops(), "sent": traffic.by_operation["alltoall_base_"]}
    if isinstance(table.share, DataParallelSharing):
        counts["formula"] = table.share.bytes_per_step(len(table.blocks), config.model.hidden_size, 4)
    return runtime.gather(lambda: counts)


def tensor_traffic(modes: list[str]) -> dict[str, Any]:
    """Bytes between tensor ranks, by mode and number of micro-batches, all of the same ids; and sizes."""
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(5))
    sent: dict[str, Any] = {"distinct": ids.unique().numel(), "positions": ids.numel()}
    for mode in modes:
        config = tiny_config({"kind": "memory"}, memory=MODES[mode], parallel={"tensor": 2})
        runtime = processes.start(config)
        executor: Any = make_trainer(config, runtime).executor
        for count in (1, 3):
            with Traffic() as traffic:
                executor.backward([(ids, ids.roll(-1, 1))] * count, 1.0)
            sent[f"{mode} {count}"] = traffic.by_operation["allreduce_"]
    return sent
