"""The process of one variant of `bench train`: builds it, then executes orders from its standard input.

Each variant has its own process, so that memory peaks are its own; the coordinator (train.py) runs one at a
time.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch

from mlm_train.bench.memory_in_use import memory_in_use
from mlm_train.bench.train_presets import PRESETS, SEED, Preset, Variant, make_config
from mlm_train.bench.train_runners import StepRunner, build_runner
from mlm_train.bench.worker_process import serve_orders
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.runtime import pick_device
from mlm_train.train.batches import MicroBatch, step_batches
from mlm_train.utils.host_memory import give_back

MEASURED = 3  # micro-batches of the step whose peak is measured: from the second on gradients exist
SCARCE = 0.25  # free fraction of the machine's memory below which it is given back
ONE_PROCESS = Topology(world=1, rank=0, tensor=1, pipeline=1)


def work() -> int:
    """Serve the coordinator until it closes the pipe."""
    return serve_orders(VariantWorker)


class VariantWorker:
    """A built variant and its measurements."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.preset = replace(PRESETS[order["preset"]], tokens=order["tokens"])
        self.variant = Variant.named(order["variant"])
        self.precision, self.data = order["precision"], order["data"]
        self.device = pick_device(order["device"])
        self.memory = memory_in_use(self.device)
        self.synchronize = torch.get_device_module(self.device).synchronize
        self.samples = Samples(PreparedData.open(self.data).split("train"), self.preset.sequence, SEED)
        self._load_libraries()
        runtime = self.memory.now()
        self.runner = self._build(self.preset)
        self.weights = list(self.runner.model.parameters())
        self.built: dict[str, Any] = {
            "runtime": runtime,
            "weights": sum(weight.nbytes for weight in self.weights),
            "parameters": sum(weight.numel() for weight in self.weights),
        }

    def _build(self, preset: Preset) -> StepRunner:
        kind = self.device.type
        config = make_config(preset, self.variant, self.data, self.precision, preset.tokens, kind)
        return build_runner(self.variant, config)

    def _load_libraries(self) -> None:
        """Run a step of a tiny model, so that memory of torch and its compiler is not the model's."""
        tiny = PRESETS["tiny"]
        runner = self._build(tiny)
        ids = torch.randint(tiny.vocabulary, (tiny.micro_batch, tiny.sequence))
        batch = MicroBatch(ids, ids)
        runner.begin([batch])
        try:
            runner.run(0)
        except Exception as error:
            if not self.variant.compiled:
                raise
            raise _does_not_compile(error) from error
        runner.finish()
        runner.update()
        del runner
        if self.variant.compiled:
            torch._dynamo.reset()

    def do(self, order: dict[str, Any]) -> dict[str, Any]:
        """Execute an order, {"do": name} with its arguments. Returns the answer."""
        actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "build": lambda order: self.built,
            "begin": self._begin,
            "run": self._run,
            "finish": lambda order: self._timed(self.runner.finish),
            "whole": self._whole,
            "zero": self._zero,
            "norm": self._norm,
            "update": self._update,
            "memory": self._memory,
        }
        try:
            answer = actions[order["do"]](order)
        except Exception as error:
            if not self.variant.compiled:
                raise
            raise _does_not_compile(error) from error
        memory = psutil.virtual_memory()
        if memory.available < SCARCE * memory.total:
            give_back()  # memory is shared by all variants' processes
        return answer

    def _batches(self, tokens: int) -> list[MicroBatch]:
        """The micro-batches of the first step of `tokens` tokens; the same ids for all variants."""
        count = tokens // self.preset.sequence
        return step_batches(self.samples, 0, count, self.preset.micro_batch, ONE_PROCESS)

    def _timed(self, work: Callable[[], Any]) -> dict[str, Any]:
        """Run `work`; wall seconds and CPU seconds of all threads, and its result as loss."""
        self.synchronize()  # a device works on after its kernels are launched
        started, busy = time.perf_counter(), time.process_time()
        result = work()
        self.synchronize()
        answer = {"seconds": time.perf_counter() - started, "processor": time.process_time() - busy}
        return answer | ({} if result is None else {"loss": result})

    def _begin(self, order: dict[str, Any]) -> dict[str, Any]:
        self.batches = self._batches(order["tokens"])
        return self._timed(lambda: self.runner.begin(self.batches))

    def _run(self, order: dict[str, Any]) -> dict[str, Any]:
        number = order["number"] % len(self.batches)
        return self._timed(lambda: self.runner.run(number))

    def _whole(self, order: dict[str, Any]) -> dict[str, Any]:
        batches = self._batches(order["tokens"])
        return self._timed(lambda: self.runner.whole(batches))

    def _zero(self, order: dict[str, Any]) -> dict[str, Any]:
        """Zero the gradients; they stay allocated, as from the second micro-batch of a step on."""
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad.zero_()
        return {}

    def _norm(self, order: dict[str, Any]) -> dict[str, Any]:
        squares = [w.grad.double().square().sum().item() for w in self.weights if w.grad is not None]
        return {"norm": sum(squares) ** 0.5}

    def _update(self, order: dict[str, Any]) -> dict[str, Any]:
        """Time optimizer steps, each with the current gradients; the first one allocates its state."""
        kept = [None if weight.grad is None else weight.grad.clone() for weight in self.weights]
        seconds = []
        for _ in range(order["runs"] + 1):
            for weight, gradient in zip(self.weights, kept, strict=True):
                weight.grad = None if gradient is None else gradient.clone()
            seconds.append(self._timed(self.runner.update)["seconds"])
        return {"seconds": seconds[1:]}

    def _memory(self, order: dict[str, Any]) -> dict[str, Any]:
        """Peak memory of a step, before and with the optimizer, whose state exists since `update`.

        The peak is reset first; begin has the ids of the whole step.
        """
        batches = self._batches(order["tokens"])
        state = [value for states in self.runner.optimizer.state.values() for value in states.values()]
        optimizer = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
        self.memory.reset_peak()
        self.runner.begin(batches)
        tables = sum(tensor.untyped_storage().nbytes() for tensor in self.runner.step_tensors())
        for number in range(min(MEASURED, len(batches))):
            self.runner.run(number)
        self.runner.finish()
        peak = self.memory.peak()
        gradients = sum(weight.grad.nbytes for weight in self.weights if weight.grad is not None)
        self.runner.update()
        return {
            "peak": peak,
            "peak_with_update": self.memory.peak(),
            "gradients": gradients,
            "optimizer": optimizer,
            "tables": tables,
        }


def _does_not_compile(error: Exception) -> UserError:
    lines = str(error).strip().splitlines() or [""]
    return UserError(f"does not compile: {type(error).__name__}: {lines[0]}")
