"""`bench tol`: the cost of building a ToL, compared with bare matmuls and plain file writing.

Writes a random bf16 export and builds its table on Ray. Before and after, as many processes as the build has
workers run bare matmuls and FFN-M in turn; last, one process writes partitions and plain files in turn.
"""

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mlm_train.bench import report, tol_show, tol_worker
from mlm_train.checkpoint.hf.folder import expected_shapes, write_folder
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.tol.build.builder import CHUNK_ROWS, Build
from mlm_train.tol.build.ray_cluster import ray_cluster
from mlm_train.tol.build.worker import PROCESS_TITLE
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.utils.arguments import refuse_below_one
from mlm_train.utils.records import record_of

PRESETS = {  # layers, hidden, FFN-M's width, vocabulary
    "1b": {"layers": 24, "hidden": 2048, "ffn": 5464, "vocabulary": 128256},
    "tiny": {"layers": 2, "hidden": 64, "ffn": 172, "vocabulary": 4096},
}
CHUNKS = (1024, 2048, 4096)  # rows per matmul
ROWS = max(CHUNKS)  # per layer and turn
LAYERS = 8  # per turn, at most: more than the CPU caches hold
SHARD_BYTES = 2**30
SEED = 1234
POLL = 0.25  # seconds between two samples of the workers' memory
RESTS = 100  # minimum pause, in units of a sample's duration: for large processes about 0.2 s of CPU time


@dataclass
class Repeated:
    """Repeated measurements by name, and their units."""

    values: dict[str, list[float]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str) -> None:
        """Add a value of a measurement."""
        self.values.setdefault(name, []).append(value)
        self.units[name] = unit

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started, "s")

    def median(self, name: str) -> float:
        """The median of a measurement."""
        return statistics.median(self.values[name])

    def ratio(self, above: str, below: str) -> float:
        """The median over turns of the ratio of two measurements."""
        return report.median_ratio(self.values[above], self.values[below])

    @property
    def best_chunk(self) -> str:
        """The name of the chunk size at which the matmuls of all processes are fastest."""
        return min((f"gemm.{chunk}" for chunk in CHUNKS), key=self.median)


def bench_tol(args: argparse.Namespace) -> int:
    """Measure, print and write; return exit code 0."""
    config = _config(args)
    _check(args, config)
    machine, measured = report.machine(), Repeated()
    with _folder(args.folder, args.keep) as folder:
        measure(folder, config, args, measured)
    rows = [report.row(name, values, measured.units[name]) for name, values in measured.values.items()]
    ratios = ratios_of(measured, config, args.workers)
    tol_show.show(rows, ratios, machine, measured.best_chunk)
    if args.json is not None:
        report.write_report(Path(args.json), machine, rows, ratios)
    if args.plot is not None:
        tol_show.plot(rows, config.num_hidden_layers, measured.best_chunk, Path(args.plot))
    return 0


def _config(args: argparse.Namespace) -> ModelConfig:
    sizes = PRESETS[args.preset] | {
        name: given for name in PRESETS[args.preset] if (given := getattr(args, name)) is not None
    }
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"--{name} {value}: give at least 1")
    if sizes["vocabulary"] < ROWS:
        raise UserError(f"--vocabulary {sizes['vocabulary']}: give at least {ROWS}, the rows of a turn")
    if sizes["hidden"] % 64:
        raise UserError(f"--hidden {sizes['hidden']}: give a multiple of 64, the size of a head")
    fields = {
        "kind": "memory",
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["hidden"] // 64,
        "intermediate_size": sizes["ffn"],
    }
    return record_of(ModelConfig, fields, "the model of these options", "choose smaller sizes")


def _check(args: argparse.Namespace, config: ModelConfig) -> None:
    refuse_below_one(args, "runs", "workers", "threads")
    report.check_outputs(args)
    if not Path(args.folder).is_dir():
        raise UserError(f"--folder {args.folder}: name a folder that exists")
    export = 2 * sum(shape.numel() for shape in expected_shapes(config).values())
    table = 2 * config.vocab_size * config.num_hidden_layers * config.hidden_size
    needed, free = export + table * 9 / 8, shutil.disk_usage(args.folder).free  # with one more partition
    if free < needed:
        raise UserError(
            f"--folder {args.folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} are needed"
        )


@contextmanager
def _folder(parent: str, keep: bool) -> Iterator[Path]:
    """A new folder, removed at the end unless `keep`."""
    folder = Path(tempfile.mkdtemp(prefix="bench-tol-", dir=parent))
    try:
        yield folder
    finally:
        if keep:
            Console(stderr=True).print(f"kept: {folder}", soft_wrap=True)
        else:
            shutil.rmtree(folder)


def measure(folder: Path, config: ModelConfig, args: argparse.Namespace, measured: Repeated) -> None:
    """Run all measurements in an empty folder."""
    export = folder / "model"
    write_folder(export, config, random_tensors(config), dtype=torch.bfloat16, shard_bytes=SHARD_BYTES)
    with measured.timed("parts.open"):
        build = Build(export, folder / "tol", TableSpec(), threads=args.threads)
    _in_turn(build, export, args, measured)
    weights = 2 * 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    with ExitStack() as stack:
        with measured.timed("ray_start"):
            stack.enter_context(ray_cluster(args.workers * args.threads, shared_bytes=weights))
        with MemorySampler(args.workers) as memory, measured.timed("parts.run"):
            build.run(args.workers)
    measured.add("whole", measured.median("parts.open") + measured.median("parts.run"), "s")
    for peaks in memory.peaks.values():
        for kind, peak in peaks.items():
            measured.add(f"worker.{kind}", peak / 2**20, "MiB")
    _in_turn(build, export, args, measured)
    _files(folder, build, args, measured)


def random_tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of an export with random values."""
    torch.manual_seed(SEED)
    for name, shape in expected_shapes(config).items():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(mean, config.init_std)


def _in_turn(build: Build, export: Path, args: argparse.Namespace, measured: Repeated) -> None:
    """Measure matmuls and FFN-M in turn, in seconds per layer: in all processes at once, and in one alone."""
    layers, vocabulary = build.plan.layers[:LAYERS], build.plan.vocab_size
    variants: list[tuple[str, Callable[[int, int], float], int]] = [
        (f"gemm.{chunk}", tol_worker.matmuls, chunk) for chunk in CHUNKS
    ]
    variants.append(("compute", tol_worker.ffn_m, CHUNK_ROWS))
    with ExitStack() as stack:
        processes = [stack.enter_context(tol_worker.start_process(args.threads)) for _ in range(args.workers)]
        for ready in [process.submit(tol_worker.open_layers, export, layers) for process in processes]:
            ready.result()
        for _ in track(range(args.runs), "matmuls", console=Console(stderr=True), transient=True):
            for prefix, running in (("", processes), ("one.", processes[:1])):
                for name, work, chunk in variants:
                    rate = len(layers) * _rate(running, work, chunk)
                    measured.add(prefix + name, vocabulary / rate, "s per layer")


def _rate(processes: list[ProcessPoolExecutor], work: Callable[[int, int], float], chunk: int) -> float:
    """Rows per second of all processes, started at the same time."""
    running = [process.submit(work, ROWS, chunk) for process in processes]
    return sum(ROWS / future.result() for future in running)


def _files(folder: Path, build: Build, args: argparse.Namespace, measured: Repeated) -> None:
    """Measure the parts of a partition other than FFN-M, and plain writing, in turn."""
    plan = build.plan
    layout = Layout.of(plan.spec, plan.num_layers, plan.hidden_size)
    start, stop = plan.rows(0)
    size = layout.shape.file_bytes(stop - start)
    with tol_worker.start_process(args.threads) as process:
        for _ in track(range(args.runs), "files", console=Console(stderr=True), transient=True):
            work = (folder, layout, stop - start, plan.chunk_rows)
            spent = process.submit(tol_worker.files, *work).result()
            for part in ("encode", "write", "hash", "commit"):
                measured.add(f"parts.{part}", spent[part], "s per partition")
            measured.add("plain.write", size / spent["plain"] / 1e9, "GB/s")
            measured.add("tol.write", size / spent["write"] / 1e9, "GB/s")


class MemorySampler:
    """Samples the peak memory of each of a build's workers, in bytes, while the block runs.

    private: USS. share: PSS, with the worker's share of memory that several processes use, such as the
    weights. resident: RSS, with all of that. Sees only workers of a Ray that this process started, and none
    whose build ends before the first sample.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.peaks: dict[int, dict[str, int]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = POLL / 5  # a small build ends soon
        while not self._ended.wait(pause):
            took = 0.0
            for process in psutil.Process().children(recursive=True):
                try:
                    if not "".join(process.cmdline()[:1]).startswith(PROCESS_TITLE):
                        continue
                    started = time.perf_counter()
                    now = process.memory_full_info()
                except psutil.Error:
                    continue  # it has just ended
                took += time.perf_counter() - started
                if not now.uss:
                    continue  # it is ending, and has given its memory back
                before = self.peaks.setdefault(process.pid, {})
                for kind, size in (("private", now.uss), ("share", now.pss), ("resident", now.rss)):
                    before[kind] = max(before.get(kind, 0), size)
            if len(self.peaks) == self.workers:
                pause = max(POLL, RESTS * took)


def ratios_of(measured: Repeated, config: ModelConfig, workers: int) -> dict[str, float]:
    """The report's ratios; matmuls at their best chunk size."""
    best = measured.best_chunk
    ratios = {
        "compute_over_gemm": measured.ratio("compute", best),
        "whole_over_gemm": measured.median("whole") / (measured.median(best) * config.num_hidden_layers),
        "write_over_plain": measured.ratio("tol.write", "plain.write"),
    }
    if workers == 2:
        values = (measured.values[name] for name in ("one.compute", "compute", f"one.{best}", best))
        turns = zip(*values, strict=True)
        ratios["two_workers_over_gemm_scaling"] = statistics.median(
            (one / both) / (one_gemm / both_gemm) for one, both, one_gemm, both_gemm in turns
        )
    return ratios
