"""`bench checkpoint`: how long a checkpoint blocks training, and the disk bandwidth of saves and loads.

One process trains a base model. Alternating: as many bytes are written to a plain file, a checkpoint is saved
while training waits, one is saved during training, and both are read back.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlm_train.bench import report
from mlm_train.bench.built import SEED, build, step_config
from mlm_train.checkpoint.load import load_training_state, open_checkpoint
from mlm_train.checkpoint.saver import Saver
from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.monitor.report import Saved
from mlm_train.parallel.build import build_engine
from mlm_train.train.batches import MicroBatch
from mlm_train.train.step import Trainer
from mlm_train.utils.arguments import refuse_below_one
from mlm_train.utils.files import sync

GIB = 2**30
VOCABULARY, HIDDEN, LENGTH = 32768, 512, 128
LAYER = 12 * HIDDEN**2  # approximate parameters of a layer
BLOCK = 2**24  # bytes per write
WITHOUT_FILE = ("stall", "step", "step_meanwhile")  # figures without a bandwidth


def bench_checkpoint(args: argparse.Namespace) -> int:
    """Measure, print and write the report. Returns 0."""
    _check(args)
    machine = report.machine()
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.folder) as folder:
        benchmark = _Benchmark(Path(folder), args.gib)
        console = Console(stderr=True)
        for _ in track(range(args.runs), "measuring", console=console, transient=True):
            benchmark.turn()
    rows, ratios = benchmark.rows(), benchmark.ratios()
    _show(rows, ratios, machine, benchmark.bytes)
    if args.json is not None:
        report.write_report(Path(args.json), machine, rows, ratios)
    return 0


def _check(args: argparse.Namespace) -> None:
    refuse_below_one(args, "runs")
    if args.gib <= 0:
        raise UserError(f"--gib {args.gib}: give more than 0")
    report.check_outputs(args)
    if not Path(args.folder).is_dir():
        raise UserError(f"--folder {args.folder}: name an existing folder")
    free = shutil.disk_usage(args.folder).free / GIB
    if free < 4 * args.gib:
        raise UserError(f"--folder {args.folder} has {free:.1f} GiB free, but {4 * args.gib:.1f} are needed")


def _show(
    rows: list[dict[str, Any]], ratios: dict[str, float], machine: dict[str, Any], written: int
) -> None:
    """Print seconds, bandwidths and ratios."""
    table = Table("what", "s", "min", "max", "GiB/s", title=f"a checkpoint of {written / GIB:.2f} GiB")
    for row in rows:
        seconds = [f"{row[key]:.3f}" for key in ("median", "min", "max")]
        moved = "" if row["name"] in WITHOUT_FILE else f"{written / GIB / row['median']:.2f}"
        table.add_row(row["name"], *seconds, moved)
    wide = Console(width=110, soft_wrap=True)
    wide.print(table, soft_wrap=False)
    for name, ratio in ratios.items():
        wide.print(f"{name}: {ratio:.3f}")
    wide.print(report.describe(machine))


class _Benchmark:
    """A model in training, and the measurements on it."""

    def __init__(self, folder: Path, gib: float) -> None:
        layers = max(1, round((gib * GIB / 12 - 2 * VOCABULARY * HIDDEN) / LAYER))
        model = {
            "vocab_size": VOCABULARY if gib >= 0.5 else 512,
            "hidden_size": HIDDEN,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "intermediate_size": 8 * HIDDEN // 3,
        }
        config = step_config(model, None, LENGTH, 1, 1, {"output": str(folder)})
        self.config: Config = config
        network, executor, self.runtime = build(config)
        self.engine = build_engine(network, executor, config, self.runtime)
        self.trainer = Trainer(self.engine, executor, self.runtime)
        ids = torch.randint(
            config.model.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(SEED)
        )
        self.batch = MicroBatch(ids, ids)
        self.folder, self.bytes, self.number = folder, 0, 0
        self.values: dict[str, list[float]] = {}
        self.step()
        self._saved(async_save=False)  # warm-up: libraries are loaded, memory is allocated

    def step(self) -> float:
        """Run one training step. Returns its seconds."""
        started = time.perf_counter()
        self.trainer.step([self.batch], 1e-5)
        return time.perf_counter() - started

    def turn(self) -> None:
        """Measure everything once."""
        self._keep("plain_write", _timed(self._write_plain))
        blocking, folder = self._saved(async_save=False)
        self._keep("save", blocking.seconds)
        alone = [self.step() for _ in range(4)]
        background, _ = self._saved(async_save=True)
        self._keep("background_save", background.seconds)
        self._keep("stall", background.stall)
        self._keep("step", sorted(alone)[1])
        self._keep("step_meanwhile", self.meanwhile)
        self._keep("plain_read", _timed(lambda: (self.folder / "plain").read_bytes()))
        manifest = open_checkpoint(folder, "sizes")
        self._keep("verify", _timed(lambda: open_checkpoint(folder)))
        self._keep("load", _timed(lambda: load_training_state(folder, manifest, self.engine, self.runtime)))

    def _saved(self, async_save: bool) -> tuple[Saved, Path]:
        """Save, and with async_save train meanwhile. Returns the outcome and the checkpoint's folder."""
        section = self.config.checkpoint.model_copy(update={"async_save": async_save})
        config = self.config.model_copy(update={"checkpoint": section})
        committed: list[Saved] = []
        data = {"fingerprint": "", "eod_id": 0}
        saver = Saver(self.engine, self.runtime, config, data, committed.append, print)
        self.number += 1
        saver.save({"step": self.number, "samples": 0, "tokens": 0})
        steps = []
        while async_save and not committed:
            steps.append(self.step())
            saver.poll()
        saver.finish()
        self.meanwhile = sorted(steps)[len(steps) // 2] if steps else 0.0
        self.bytes = sum(file.stat().st_size for file in committed[0].folder.iterdir())
        return committed[0], committed[0].folder

    def _write_plain(self) -> None:
        """Write as many bytes to a plain file, flushed to disk."""
        block = os.urandom(BLOCK)
        path = self.folder / "plain"
        with path.open("wb") as file:
            for _ in range(-(-self.bytes // BLOCK)):
                file.write(block)
        sync(path)

    def _keep(self, name: str, seconds: float) -> None:
        self.values.setdefault(name, []).append(seconds)

    def rows(self) -> list[dict[str, Any]]:
        """Report rows: seconds of each measurement."""
        return [report.row(name, values, "s") for name, values in self.values.items()]

    def ratios(self) -> dict[str, float]:
        """Ratios of pairs of figures, as medians over turns."""
        pairs = {
            "stall_over_save": ("stall", "save"),
            "save_bandwidth_over_plain": ("plain_write", "save"),
            "background_bandwidth_over_plain": ("plain_write", "background_save"),
            "load_bandwidth_over_plain": ("plain_read", "load"),
            "step_meanwhile_over_step": ("step_meanwhile", "step"),
        }
        medians = {}
        for name, (above, below) in pairs.items():
            ratios = [a / b for a, b in zip(self.values[above], self.values[below], strict=True)]
            medians[name] = sorted(ratios)[len(ratios) // 2]
        return medians


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
