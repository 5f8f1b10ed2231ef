"""`bench data`: samples per second of our loader and of megatron-core's GPTDataset, on the same files.

Both run in one process, alternating, each run continuing where its last one ended. Both make batches of ids
and labels, int64; megatron-core's attention mask is disabled, and its other outputs are not stacked.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mlm_train.bench import report
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError

SEED = 1234
NUMBERS = ("batch", "samples", "runs")  # of Size, options of the same name
Loader = Callable[[int, int], tuple[Tensor, Tensor]]  # first sample, count -> ids and labels


@dataclass(frozen=True)
class Size:
    """Tokens per sample, samples per batch, samples per run, runs."""

    length: int
    batch: int
    samples: int
    runs: int

    @property
    def total(self) -> int:
        """Samples per loader, including the unmeasured first run."""
        return (self.runs + 1) * self.samples


def bench_data(folder: str, size: Size, json_file: str | None) -> int:
    """Measure, print and write the report. Returns 1 if a loader's labels are not its next ids, else 0."""
    data = _checked(folder, size, json_file)
    machine, console = report.machine(), Console(stderr=True)
    seconds: dict[str, list[float]] = {"ours": [], "megatron": []}
    starts, loaders = {}, {}
    _import_megatron()
    with tempfile.TemporaryDirectory() as cache:
        for name, start in (("ours", _ours), ("megatron", _megatron)):
            started = time.perf_counter()
            loaders[name] = start(data, size, cache)
            loaders[name](0, 1)
            starts[name] = time.perf_counter() - started
        labels_follow = all(_follow(*load(0, size.batch)) for load in loaders.values())
        for run in track(range(size.runs + 1), "reading", console=console, transient=True):
            for name, load in loaders.items():
                started = time.perf_counter()
                for first in range(run * size.samples, (run + 1) * size.samples, size.batch):
                    load(first, size.batch)
                if run:  # the first one reads the files into memory
                    seconds[name].append(time.perf_counter() - started)
    rows = [
        report.row(f"{name}.samples", [size.samples / value for value in values], "samples/s")
        for name, values in seconds.items()
    ]
    rows += [report.row(f"{name}.start", [value], "s") for name, value in starts.items()]
    ratios = {"loader_over_megatron": rows[0]["median"] / rows[1]["median"]}
    _show(data, size, rows, ratios, machine)
    if json_file is not None:
        report.write_report(Path(json_file), machine, rows, ratios)
    if not labels_follow:
        console.print("[bold red]labels are not the next ids")
    return int(not labels_follow)


def _checked(folder: str, size: Size, json_file: str | None) -> PreparedData:
    options = {"sequence-length": size.length} | {name: getattr(size, name) for name in NUMBERS}
    for option, value in options.items():
        if value < 1:
            raise UserError(f"--{option} {value}: give at least 1")
    if size.samples % size.batch:
        raise UserError(f"--samples {size.samples}: give a multiple of --batch {size.batch}")
    if json_file is not None:
        report.check_writable(Path(json_file))
    data = PreparedData.open(folder)
    Samples(data.split("train"), size.length, SEED)
    return data


def _ours(data: PreparedData, size: Size, cache: str) -> Loader:
    return Samples(data.split("train"), size.length, SEED).batch


def _import_megatron() -> None:
    """Import megatron-core before anything is timed, without its warnings about unused GPU libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPU libraries that it does not need here
        import megatron.core.datasets.gpt_dataset  # noqa: F401


class _Tokenizer:
    """The tokenizer interface that GPTDataset needs."""

    def __init__(self, data: PreparedData) -> None:
        self.vocab_size, self.eod = data.vocab_size, data.eod_id
        self.unique_identifiers = {"data": data.fingerprint}


def _megatron(data: PreparedData, size: Size, cache: str) -> Loader:
    """GPTDataset as configured by Megatron-LM for pretraining; its indices are written to `cache`."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = str(data.path / "train")
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=size.length,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=_Tokenizer(data),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    stored = IndexedDataset(prefix, multimodal=False, mmap=True)
    documents = np.arange(len(stored), dtype=np.int32)
    dataset = GPTDataset(stored, prefix, documents, size.total, Split.train, config)

    def load(first: int, count: int) -> tuple[Tensor, Tensor]:
        samples = [dataset[index] for index in range(first, first + count)]
        ids, labels = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
        return ids, labels

    return load


def _follow(ids: Tensor, labels: Tensor) -> bool:
    return ids.dtype == labels.dtype == torch.int64 and torch.equal(ids[:, 1:], labels[:, :-1])


def _show(
    data: PreparedData,
    size: Size,
    rows: list[dict[str, Any]],
    ratios: dict[str, float],
    machine: dict[str, Any],
) -> None:
    table = Table(title=f"{data.path}: samples of {size.length:,} tokens, {size.batch} per batch")
    for heading in ("figure", "unit", "median", "min", "max"):
        table.add_column(heading, justify="left" if heading in ("figure", "unit") else "right")
    for row in rows:
        form = "{:,.0f}" if row["unit"] == "samples/s" else "{:.3f}"
        table.add_row(row["name"], row["unit"], *(form.format(row[key]) for key in ("median", "min", "max")))
    wide = Console(width=110, soft_wrap=True)
    wide.print(table, soft_wrap=False)
    for name, ratio in ratios.items():
        wide.print(f"{name}: {ratio:.3f}")
    wide.print(
        f"{size.runs} runs of {size.samples:,} samples each, alternating, after one that is not counted"
    )
    wide.print(report.describe(machine))
