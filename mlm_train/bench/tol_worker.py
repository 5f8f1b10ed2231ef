"""What the processes of `bench tol` run: bare matrix products, FFN-M, and files as a build writes them."""

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

BLOCK = 2**24  # bytes of a plain write
_layers: "Layers"  # of this process


def start_process(threads: int) -> ProcessPoolExecutor:
    """One fresh process, set up as a build's worker is."""
    context = get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=prepare_process, initargs=(threads,))


class Layers:
    """FFN-M of some layers of an export, in bf16, and the weights of its products."""

    def __init__(self, folder: Path, layers: Sequence[int]) -> None:
        opened = open_model(folder, verify="sizes")
        self.config = opened.config
        weights = ffn_m_weights(opened.tensors, self.config, layers, "bfloat16")
        self.numbers = ComputedRows(opened, dict(zip(layers, weights, strict=True)), "bfloat16")

    @torch.no_grad()
    def products(self, rows: int, chunk: int) -> float:
        """Seconds of the layers' products alone, for `rows` rows in chunks: gate and up as one, then down."""
        x0 = torch.randn(chunk, self.config.hidden_size).bfloat16()
        inner = torch.randn(chunk, self.config.intermediate_size).bfloat16()
        networks = [block.memory_mlp for block in self.numbers.blocks]
        started = 0.0
        for number in range(1 + rows // chunk):
            if number == 1:  # after one that finds its memory
                started = time.perf_counter()
            for network in networks:
                network.gate_up_proj(x0)
                network.down_proj(inner)
        return time.perf_counter() - started

    def ffn_m(self, rows: int, chunk: int) -> float:
        """Seconds in which a worker computes `rows` rows of the layers, after a first chunk."""
        started = 0.0
        for first, last in chunks_of(0, chunk + rows, chunk):
            if first == chunk:
                started = time.perf_counter()
            for _ in self.numbers.values(first, last):
                pass
        return time.perf_counter() - started


def open_layers(folder: Path, layers: Sequence[int]) -> None:
    """Load them into this process, and run each way once: libraries load and choose kernels."""
    global _layers
    _layers = Layers(folder, layers)
    _layers.products(64, 64)
    _layers.ffn_m(64, 64)


def products(rows: int, chunk: int) -> float:
    """Layers.products of this process."""
    return _layers.products(rows, chunk)


def ffn_m(rows: int, chunk: int) -> float:
    """Layers.ffn_m of this process."""
    return _layers.ffn_m(rows, chunk)


def files(folder: Path, layout: Layout, rows: int, chunk: int) -> dict[str, float]:
    """Seconds of a plain partition's parts without FFN-M, and of writing as many bytes. Nothing stays.

    write: the space taken, all rows written as they are while others are computed, and synced.
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
    """`size` bytes from a file's start to its end, a block at a time, flushed to disk."""
    with path.open("wb", buffering=0) as file:
        while size:
            size -= file.write(block[: min(size, len(block))])
    sync(path)
