"""What the ranks of the test of synchronisation run: operations of a step that wait for the device."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlm_train.parallel import runtime as processes
from tests.parallel.layouts import MODES
from tests.parallel.parity_cases import make_trainer, my_batches
from tests.parallel.reference import tiny_config

# On a GPU these copy a value, or the size of their result, to the host.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "equal", "is_nonzero", "repeat_interleave",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device, boolean indexing among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        boolean = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in WAITING or boolean:
            self.found[name] += 1
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))


def count_waits(modes: list[str | None]) -> list[dict[str, int]]:
    """By mode: the waits of a step's passes and update, with its rows planned ahead as the loop does."""
    found = []
    for mode in modes:
        model = {"kind": "base" if mode is None else "memory"}
        memory = {} if mode is None else {"memory": MODES[mode]}
        config = tiny_config(model, parallel={"engine": "fsdp"}, train={"micro_batch_size": 1}, **memory)
        runtime = processes.start(config)
        trainer = make_trainer(config, runtime)
        for step in range(2):  # the first one allocates
            batches = my_batches(runtime, step, config)
            trainer.executor.plan_ahead(batches)
            with Waits() as waits:
                with trainer.engine.accumulating():
                    trainer.engine.inspect(trainer.executor.backward(batches, 1.0))
                trainer.engine.step(1e-3)
        found.append(dict(waits.found))
    return found
