"""A trace of a model's layers, beside the reads of the table that they wait for."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle

from mlm_train.model.transformer import Transformer
from mlm_train.utils.trace import Trace, recording


@contextmanager
def traced(model: Transformer) -> Iterator[Trace]:
    """Record while the body runs: `layer N` of each forward pass, `tol.wait` within it, and `tol.read`.

    On an accelerator a layer's time is that of the thread that queues its work.
    """
    with recording() as trace, ExitStack() as hooks:
        for number, layer in model.layers.items():
            for hook in _watch(trace, layer, int(number)):
                hooks.callback(hook.remove)
        yield trace


def _watch(trace: Trace, layer: nn.Module, number: int) -> list[RemovableHandle]:
    """Hooks: a model that is not traced has none."""
    started: list[int] = []

    def ended(*_: object) -> None:
        trace.add(f"layer {number}", started.pop(), {"layer": number})

    return [
        layer.register_forward_pre_hook(lambda *_: started.append(time.perf_counter_ns())),
        layer.register_forward_hook(ended, always_call=True),
    ]
