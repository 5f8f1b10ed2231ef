"""A step in torch's sync debug mode: it should queue work on the device, and wait for its results alone."""

import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import mlm_train
from mlm_train.parallel import runtime as processes
from mlm_train.train.batches import pinned
from tests.gpu.checks import Figures, NotPossible
from tests.gpu.steps import FSDP, MEMORY
from tests.parallel.layouts import MODES
from tests.parallel.parity_cases import make_trainer, my_batches
from tests.parallel.reference import tiny_config

PACKAGE = Path(mlm_train.__file__).parent


def step(device: str) -> Figures:
    """A whole second step but reading its results; the first one allocates and chooses kernels."""
    module = torch.get_device_module(device)
    if not hasattr(module, "set_sync_debug_mode"):
        raise NotPossible(f"{device} has no sync debug mode")
    train = {"device": device, "precision": "bf16"}
    config = tiny_config(MEMORY, memory=MODES["table"], parallel=FSDP, train=train)
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    trainer.step(my_batches(runtime, 0, config), 1e-3)
    batches = pinned(my_batches(runtime, 1, config), runtime.device)  # as the loop has them
    module.synchronize()
    module.set_sync_debug_mode("error")
    try:
        unsynchronised(lambda: trainer.launch(batches, 1e-3))
    finally:
        module.set_sync_debug_mode("default")
    return {}


def unsynchronised(work: Callable[[], object]) -> None:
    """Run `work`; AssertionError with its first synchronising call, where torch refuses one."""
    try:
        work()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if PACKAGE in Path(frame.filename).parents]
        where = (ours or frames)[-1]
        file = Path(where.filename)
        name = file.relative_to(PACKAGE.parent) if ours else file
        raise AssertionError(f"{name}:{where.lineno} waits for the device: {where.line}") from None
