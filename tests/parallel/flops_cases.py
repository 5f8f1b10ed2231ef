"""What the ranks of MFU's test run: FLOPs of a step's matmuls counted by torch, and those in the log."""

import tempfile
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mlm_train.monitor.callback import Context
from mlm_train.monitor.log import Log
from mlm_train.monitor.monitor import Monitor
from mlm_train.monitor.report import Progress, StepReport
from mlm_train.monitor.writers import Writers
from mlm_train.parallel import runtime as processes
from tests.parallel.parity_cases import make_trainer, my_batches
from tests.parallel.reference import tiny_config

MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


def count_matmuls(cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """For each case: FLOPs of a step's matmuls on all ranks, and those that MFU counts."""
    return [_count(**case) for case in cases]


def _count(model: dict, **sections: dict) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        train = sections.pop("train", {}) | {"output": folder}
        config = tiny_config(model, train=train, monitor={"writers": []}, **sections)
        runtime = processes.start(config)
        trainer = make_trainer(config, runtime)
        batches = my_batches(runtime, 0, config)
        with FlopCounterMode(display=False) as flops:
            result = trainer.step(batches, 1e-3)
        counted = flops.get_flop_counts()["Global"]
        mine = sum(count for operation, count in counted.items() if operation in MATMULS)
        total = sum(runtime.gather(lambda: mine))
        hosts = ["here"] * runtime.topology.world
        monitor = Monitor(Context(config, runtime, hosts, Log(None), Writers()))
        values = monitor.step_values(StepReport(Progress(), 1e-3, 8, result, 0.5, {}))
        rate = values["speed/mfu_measured"] * monitor.peaks["measured"] * runtime.topology.world
        return {"matmuls": total, "logged": rate / values["speed/tokens_per_second"] * result.tokens}
