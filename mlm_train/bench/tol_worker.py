"""What the processes of `bench tol` run: bare matmuls, FFN-M, and file writing as in a build."""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch

from mlm_train.checkpoint.reading.logical_folder import open_model
from mlm_train.tol.build.row_source import ComputedRows, chunks_of, ffn_m_weights
from mlm_train.tol.build.worker import prepare_process
from mlm_train.tol.format.codec import encode
from mlm_train.tol.format.layout import Layout
from mlm_train.tol.storage.direct_io import buffers
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.utils.files import sync

BLOCK = 2**24  # bytes per plain write
_layers: "Layers"  # of this process


def start_process(threads: int) -> ProcessPoolExecutor:
    """A new process, set up like a build's worker."""
    context = get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=prepare_process, initargs=(threads,))


class Layers:
    """FFN-M of some layers of an export, in bf16."""

    def __init__(self, folder: Path, layers: Sequence[int]) -> None:
        opened = open_model(folder, verify="sizes")
        self.config = opened.config
        weights = ffn_m_weights(opened.tensors, self.config, layers, "bfloat16")
        self.source = ComputedRows(opened, dict(zip(layers, weights, strict=True)), "bfloat16")

    @torch.no_grad()
    def matmuls(self, rows: int, chunk: int) -> float:
        """Seconds of the layers' matmuls alone, for `rows` rows in chunks: gate and up as one, then down."""
        x0 = torch.randn(chunk, self.config.hidden_size).bfloat16()
        inner = torch.randn(chunk, self.config.intermediate_size).bfloat16()
        networks = [block.memory_mlp for block in self.source.blocks]
        started = 0.0
        for number in range(1 + rows // chunk):
            if number == 1:  # the first chunk allocates memory
                started = time.perf_counter()
            for network in networks:
                network.gate_up_proj(x0)
                network.down_proj(inner)
        return time.perf_counter() - started

    def ffn_m(self, rows: int, chunk: int) -> float:
        """Seconds that a worker takes to compute `rows` rows of the layers, after a first chunk."""
        started = 0.0
        for first, last in chunks_of(0, chunk + rows, chunk):
            if first == chunk:
                started = time.perf_counter()
            for _ in self.source.values(first, last):
                pass
        return time.perf_counter() - started


def open_layers(folder: Path, layers: Sequence[int]) -> None:
    """Load the layers into this process, and run both variants once, so that libraries choose kernels."""
    global _layers
    _layers = Layers(folder, layers)
    _layers.matmuls(64, 64)
    _layers.ffn_m(64, 64)


def matmuls(rows: int, chunk: int) -> float:
    """Run Layers.matmuls in this process."""
    return _layers.matmuls(rows, chunk)


def ffn_m(rows: int, chunk: int) -> float:
    """Run Layers.ffn_m in this process."""
    return _layers.ffn_m(rows, chunk)


def files(folder: Path, layout: Layout, rows: int, chunk: int) -> dict[str, float]:
    """Seconds of the parts of a plain partition other than FFN-M, and of plain writing; removes its files.

    write: reserving the space, writing all rows as a build does, and syncing.
    """
    path = folder / "rows.safetensors"
    spent = dict.fromkeys(("plain", "encode", "write", "hash", "commit"), 0.0)
    values = torch.randn(chunk, layout.hidden_size).bfloat16()
    size = layout.shape.file_bytes(rows)
    block = memoryview(os.urandom(min(BLOCK, size)))
    with _added(spent, "plain"):
        _write_plain(path, block, size)
    path.unlink()
    storage, header, digest = LocalFolder(folder), layout.shape.header(rows), hashlib.sha256()
    (data,) = buffers(chunk, layout.shape.size, 1)
    with _added(spent, "write"):
        draft = storage.draft(path.name, size, header)
        file = storage.sink(draft, header)
    for first, last in chunks_of(0, rows, chunk):
        with _added(spent, "encode"):
            for out in data[: last - first].chunk(len(layout.layers), 1):
                encode(layout.schemes[0], values[: last - first], out)
        with _added(spent, "hash"):
            digest.update(data[: last - first].numpy().data)
        with _added(spent, "write"):
            file.append(data[: last - first].numpy().reshape(-1))
    with _added(spent, "write"):
        file.finish()
        file.close()
    with _added(spent, "commit"):
        storage.name_draft(draft, path.name, size)
    path.unlink()
    return spent


@contextmanager
def _added(spent: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent[part] += time.perf_counter() - started


def _write_plain(path: Path, block: memoryview, size: int) -> None:
    """Write `size` bytes sequentially, a block at a time, and flush them to disk."""
    with path.open("wb", buffering=0) as file:
        while size:
            size -= file.write(block[: min(size, len(block))])
    sync(path)
