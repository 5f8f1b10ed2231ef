"""The ranks of `bench checkpoint`: they train a base model under ZeRO-1, save it and load it again.

In each turn, alternating: as many bytes are written to plain files, a checkpoint is saved while training
waits, one is saved during training, and all are read back. A rank's plain file has as many bytes as it has of
the checkpoint. Older checkpoints are deleted between measurements, not in them.
"""

import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from mlm_train.bench import report
from mlm_train.bench.built import SEED, build, step_config
from mlm_train.bench.file_traffic import FileTraffic
from mlm_train.checkpoint.load import load_training_state, open_checkpoint
from mlm_train.checkpoint.saver import Saver
from mlm_train.checkpoint.together import first_hash_fault
from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.model.counts import count_parameters
from mlm_train.monitor.report import Saved
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_engine
from mlm_train.train.batches import MicroBatch
from mlm_train.train.step import Trainer
from mlm_train.utils.direct import PAGE, DirectFile
from mlm_train.utils.files import sync

GIB = 2**30
VOCABULARY, HIDDEN, LENGTH = 32768, 512, 128
LAYER = 12 * HIDDEN**2  # approximate parameters of a layer
BLOCK = 2**24  # bytes of a plain write or read


def work(order_file: str) -> int:
    """Run on a rank: measure as ordered; rank 0 writes the result beside `order_file`."""
    order = report.read_order(order_file)
    benchmark = _Benchmark(Path(order["folder"]), order["gib"], order["world"])
    runtime = benchmark.runtime
    console = Console(stderr=True)
    turns = range(order["runs"])
    for _ in track(turns, "measuring", console=console, transient=True, disable=not runtime.is_rank_0):
        benchmark.turn()
    if runtime.is_rank_0:
        parameters = count_parameters(benchmark.config.model).stored
        result = {"values": benchmark.values, "bytes": benchmark.bytes, "parameters": parameters}
        report.write_result(order_file, result)
    runtime.barrier()
    processes.stop()
    return 0


def make_config(gib: float, world: int, folder: Path) -> Config:
    """Config of a model whose checkpoint has about so many GiB."""
    layers = max(1, round((gib * GIB / 12 - 2 * VOCABULARY * HIDDEN) / LAYER))
    model = {
        "vocab_size": VOCABULARY if gib >= 0.5 else 512,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "intermediate_size": 8 * HIDDEN // 3,
    }
    parallel = {"zero_stage": 1} if world > 1 else {}  # alone, every engine writes the same
    return step_config(model, None, LENGTH, 1, world, {"output": str(folder)}, parallel)


class _Benchmark:
    """A model in training, and the measurements on it: in each turn those of the rank with the highest."""

    def __init__(self, folder: Path, gib: float, world: int) -> None:
        self.config = config = make_config(gib, world, folder)
        network, executor, self.runtime = build(config)
        self.engine = build_engine(network, executor, config, self.runtime)
        self.trainer = Trainer(self.engine, executor, self.runtime)
        ids = torch.randint(
            config.model.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(SEED)
        )
        self.batch = MicroBatch(ids, ids)
        self.folder, self.number, self.values = folder, 0, dict[str, list[float]]()
        self.committed: list[Saved] = []
        data = {"fingerprint": "", "eod_id": 0}
        self.saver = Saver(self.engine, self.runtime, config, data, self.committed.append, print)
        self.step()
        self._save(in_background=False)  # libraries are loaded, memory is allocated
        self.bytes = sum(file.stat().st_size for file in self.checkpoint.iterdir())
        self.room = [torch.zeros_like(tensor) for tensor in self.saver.room]
        self.plain = folder / f"plain-{self.runtime.topology.rank}"
        self.contents = memoryview(mmap.mmap(-1, self._written()))
        self._write_plain()
        self._read_plain()

    @property
    def checkpoint(self) -> Path:
        """The newest one."""
        return self.committed[-1].folder

    def step(self) -> float:
        """Run one training step. Returns its seconds."""
        started = time.perf_counter()
        self.trainer.step([self.batch], 1e-5)
        return time.perf_counter() - started

    def turn(self) -> None:
        """Measure everything once."""
        self.plain.unlink()
        self._time("plain_write_direct", self._write_direct)
        self.plain.unlink()
        self._time("plain_write", self._write_plain)
        self._save(in_background=False)
        self._keep("save", self.committed[-1].seconds)
        self._keep("written", self._written())
        if self.runtime.topology.world == 1:
            alone = sorted(self.step() for _ in range(5))
            self._keep("step_meanwhile", self._save(in_background=True, trains=True))
            self._keep("step", alone[2])
            self._keep("background_save", self.committed[-1].seconds)
        else:
            self._save(in_background=True)
        self._keep("stall", self.committed[-1].stall)
        self._time("copy", self._copy)
        self._keep("copied", sum(tensor.nbytes for tensor in self.saver.room))
        self._keep("cached", self._forget())
        self._time("plain_read", self._read_plain)
        self._time("plain_read_cached", self._read_plain)
        for kind, verified in (("", False), ("_verified", True)):
            self._forget()
            with FileTraffic(self.checkpoint) as traffic:
                self._time(f"load{kind}", partial(self._load, verified))
            self._keep(f"read{kind}", traffic.bytes_read, of_all=sum)
            self._keep(f"opens{kind}", traffic.opens)
        self._time("load_verified_cached", partial(self._load, True))

    def _save(self, in_background: bool, trains: bool = False) -> float:
        """Save, and with `trains` step meanwhile. Returns the median seconds of these steps."""
        if self.runtime.is_rank_0:  # so that no save deletes a checkpoint
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        section = self.config.checkpoint.model_copy(update={"async_save": in_background})
        self.saver.config = self.config.model_copy(update={"checkpoint": section})
        self.number += 1
        self.runtime.barrier()
        busy = time.process_time()
        self.saver.save({"step": self.number, "samples": 0, "tokens": 0})
        if in_background:
            self._keep("stall_cpu", time.process_time() - busy)
        steps = []
        while trains and len(self.committed) < self.number:
            steps.append(self.step())
            self.saver.poll()
        self.saver.finish()
        return statistics.median(steps) if steps else 0.0

    def _load(self, verified: bool) -> None:
        """What a resume does, after the model is built."""
        folder = self.checkpoint
        manifest = self.runtime.broadcast(lambda: open_checkpoint(folder, "sizes"))
        if verified and (fault := first_hash_fault(folder, manifest.every_file, self.runtime)):
            raise UserError(fault)
        load_training_state(folder, manifest, self.engine, self.runtime)

    def _written(self) -> int:
        """Bytes of the newest checkpoint that this rank has written."""
        files = list(self.checkpoint.glob(f"shard-{self.runtime.topology.rank:05d}.*"))
        if self.runtime.is_rank_0:
            files += [file for file in self.checkpoint.iterdir() if file.suffix != ".safetensors"]
        return sum(file.stat().st_size for file in files)

    def _copy(self) -> None:
        """Copy as many bytes in memory as a save copies."""
        for room, tensor in zip(self.room, self.saver.room, strict=True):
            room.copy_(tensor)

    def _write_plain(self) -> None:
        """Write as many bytes to a plain file as a save, and flush it to disk."""
        with self.plain.open("wb", buffering=0) as file:
            for start in range(0, len(self.contents), BLOCK):
                file.write(self.contents[start : start + BLOCK])
            os.fsync(file.fileno())

    def _write_direct(self) -> None:
        """The same past the system's cache, as saves write, by one thread."""
        with DirectFile(self.plain) as file:
            for start in range(0, len(self.contents), BLOCK):
                whole = len(self.contents) // PAGE * PAGE  # the last bytes of a page make no difference
                file.write(self.contents[start : min(start + BLOCK, whole)], start)
            file.finish(len(self.contents))

    def _read_plain(self) -> None:
        """Read the plain file to memory."""
        with self.plain.open("rb", buffering=0) as file:
            for start in range(0, len(self.contents), BLOCK):
                file.readinto(self.contents[start : start + BLOCK])

    def _forget(self) -> float:
        """Have the system drop all files from its cache. Returns the fraction that it has kept."""
        self.runtime.barrier()
        kept = [_forget(path) for path in (*self.folder.glob("plain-*"), *self.checkpoint.iterdir())]
        self.runtime.barrier()
        return sum(kept) / len(kept)

    def _time(self, name: str, work: Callable[[], None]) -> None:
        """Keep the seconds until all ranks have done `work`."""
        self.runtime.barrier()
        started = time.perf_counter()
        work()
        self._keep(name, time.perf_counter() - started)

    def _keep(self, name: str, value: float, of_all: Callable[[list[float]], float] = max) -> None:
        self.values.setdefault(name, []).append(of_all(self.runtime.gather(lambda: value)))


def _forget(path: Path) -> float:
    """Drop a file from the system's cache. Returns the fraction of its blocks that it has kept there."""
    sync(path)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return statistics.mean(_is_cached(file.fileno(), start) for start in range(0, max(size, 1), BLOCK))


def _is_cached(file: int, at: int) -> bool:
    try:
        return bool(os.preadv(file, [bytearray(1)], at, os.RWF_NOWAIT))
    except OSError:  # it would have to wait for the disk
        return False
