"""Run by the ranks of the memory test: a step, before which one rank has allocated half a GiB more."""

import resource

import torch
import torch.distributed as dist

from mlm_train.monitor.callback import Context
from mlm_train.monitor.log import Log
from mlm_train.monitor.monitor import Monitor
from mlm_train.monitor.report import Progress, StepReport
from mlm_train.monitor.writers import Writers
from mlm_train.parallel import runtime as processes
from tests.parallel.layouts import MODELS
from tests.parallel.parity_cases import make_trainer, my_batches
from tests.parallel.reference import tiny_config

TAKEN = 2**29  # bytes


def run(guilty: int) -> list[tuple[float, float, list[float], list[float]]]:
    """By rank: peak in GiB and its rank as in TensorBoard, all peaks in bytes, and the ranks' own figures."""
    config = tiny_config(dict(MODELS["base"]), train={"micro_batch_size": 1}, monitor={"peak_tflops": 1.0})
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    if runtime.topology.rank == guilty:
        torch.ones(TAKEN // 4)
    result = trainer.step(my_batches(runtime, 0, config), 1e-3)
    quiet = Monitor.__new__(Monitor)
    quiet.config, quiet.peaks = config, {"measured": 1e12}
    quiet.context = Context(config, runtime, [], Log(None), Writers())
    values = quiet.step_values(StepReport(Progress(), 1e-3, 4, result, 0.0, {}))
    own = [0.0] * runtime.topology.world
    dist.all_gather_object(own, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0)
    mine = (values["memory/peak_gib"], values["memory/peak_gib_rank"], list(result.peak_memory), own)
    everyone: list[tuple[float, float, list[float], list[float]]] = [mine] * runtime.topology.world
    dist.all_gather_object(everyone, mine)
    return everyone
