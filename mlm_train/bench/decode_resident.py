"""`bench decode`: the memory that one kind needs to be served, in a process of its own."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_train.bench import decode_models as models
from mlm_train.bench import report
from mlm_train.bench.memory_in_use import status_bytes
from mlm_train.checkpoint.hf.folder import expected_shapes, write_folder
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.inference.language_model import load
from mlm_train.tol.serve.store import StoreOptions
from mlm_train.utils.host_memory import return_freed

_INTERVAL = 0.002  # seconds between samples


def write_export(folder: Path, config: ModelConfig) -> None:
    """Write an export with random weights in bfloat16."""
    write_folder(folder, config, _random_tensors(config), dtype=models.DTYPE)


def _random_tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, shape in expected_shapes(config).items():
        holder = torch.nn.Module()
        holder.weight = torch.nn.Parameter(torch.empty(shape, device="meta"))
        models.fill(holder)
        yield name, holder.weight


def work(order_file: str) -> int:
    """Load, read a prompt and generate until the context is full; write the peak. Returns exit code 0.

    order: model, an export; tol, or None; prompt, ids; context. Freed memory is returned at once, so that
    what the C library would keep is not counted. Mapped files are not, be they the table's or the weights'.
    """
    order = report.read_order(order_file)
    return_freed()
    before = _private()
    with _Peak() as peak:
        options = None if order["tol"] is None else StoreOptions("disk", direct=True)
        model = load(
            order["model"],
            order["tol"],
            store=options,
            dtype=models.DTYPE,
            verify="none",
            skip_tokenizer=True,
        )
        new = order["context"] - len(order["prompt"])
        model.generate(order["prompt"], max_new_tokens=new, ignore_eos=True)
    report.write_result(order_file, {"bytes": peak.bytes - before})
    return 0


class _Peak:
    """The most private memory in use, sampled by a thread while this context is open."""

    def __init__(self) -> None:
        self.bytes, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, _private())
            if self._end.wait(_INTERVAL):
                return


def _private() -> int:
    found = status_bytes("RssAnon")
    if found is None:
        raise UserError("private memory can only be read on Linux")
    return found
