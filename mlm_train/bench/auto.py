"""`bench auto`: compare memory.mode=auto with every measured mode, on shapes with different best modes."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlm_train.bench import report
from mlm_train.bench.built import MODES, SEED, build, step_config
from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.pipeline.single_stage import Batch, Executor
from mlm_train.plan.ffn_m import Distinct, choose
from mlm_train.plan.speeds import measure_speeds

GIB = 2.0**30


@dataclass(frozen=True)
class Shape:
    """A model and the micro-batches of a step."""

    hidden: int
    keys: int  # of FFN-M
    layers: int
    vocabulary: int
    length: int
    micro_batch: int
    micro_batches: int
    flat: bool = False  # ids drawn from a uniform distribution instead of as in text


# One micro-batch per step, two, many; a narrow FFN-M; hardly any repeated ids; a wide FFN-M.
SHAPES = {
    "single": Shape(256, 683, 4, 8192, 256, 8, 1),
    "pair": Shape(256, 683, 4, 8192, 256, 4, 2),
    "many": Shape(256, 683, 4, 8192, 256, 4, 16),
    "narrow": Shape(256, 8, 4, 8192, 256, 4, 8),
    "rare": Shape(384, 4096, 3, 16384, 128, 2, 4, flat=True),
    "wide": Shape(384, 4096, 2, 16384, 256, 2, 12),
}


def config_of(shape: Shape, mode: str) -> Config:
    """The config of a shape with a memory mode."""
    model = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 4,
        "intermediate_size": shape.keys,
    }
    train = {"precision": "bf16"}
    return step_config(model, mode, shape.length, shape.micro_batch, shape.micro_batches, train)


def bench_auto(runs: int, names: Sequence[str] | None, json_file: str | None) -> int:
    """Measure, print and write the report. Returns 0."""
    shapes = _checked(runs, names, json_file)
    machine, console = report.machine(), Console(stderr=True)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    title = "forward and backward of a step, seconds"
    table = Table("shape", *MODES, "auto chooses", "over best", title=title)
    for name, shape in track(shapes.items(), "measuring", console=console, transient=True):
        seconds, chosen = _measure(shape, runs)
        rows += [report.row(f"{name}.{mode}", values, "s") for mode, values in seconds.items()]
        medians = {mode: statistics.median(values) for mode, values in seconds.items()}
        ratios[f"{name}.auto_over_best"] = medians[chosen] / min(medians.values())
        cells = [f"{medians[mode]:.3f}" for mode in MODES]
        table.add_row(name, *cells, chosen, f"{ratios[f'{name}.auto_over_best']:.3f}")
    output = Console()
    output.print(table)
    output.print(report.describe(machine))
    if json_file is not None:
        report.write_report(Path(json_file), machine, rows, ratios)
    return 0


def _checked(runs: int, names: Sequence[str] | None, json_file: str | None) -> dict[str, Shape]:
    """The chosen shapes. UserError for wrong options."""
    if runs < 1:
        raise UserError(f"--runs {runs}: give at least 1")
    if json_file is not None:
        report.check_writable(Path(json_file))
    for name in names or ():
        if name not in SHAPES:
            raise UserError(f"--shapes {name}: choose from {', '.join(SHAPES)}")
    return {name: SHAPES[name] for name in names or SHAPES}


def _measure(shape: Shape, runs: int) -> tuple[dict[str, list[float]], str]:
    """Seconds of each mode's steps, alternating, and the mode that auto chooses."""
    batches = [(ids, ids.roll(-1, 1)) for ids in _ids(shape).split(shape.micro_batch)]
    executors = {mode: build(config_of(shape, mode))[1] for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for run in range(runs + 1):
        for mode, executor in executors.items():
            step_seconds = _step(executor, batches)
            if run:  # the first is warm-up
                seconds[mode].append(step_seconds)
    config = config_of(shape, "auto")
    runtime, distinct = processes.start(config), Distinct.of([ids for ids, _ in batches])
    choice = choose(config, runtime.topology, distinct, measure_speeds(config, runtime), GIB)
    assert choice.config.memory is not None
    return seconds, "kept" if choice.config.memory.kept_layers else choice.config.memory.mode


def _step(executor: Executor, batches: list[Batch]) -> float:
    started = time.perf_counter()
    executor.backward(batches, 1e-3)
    return time.perf_counter() - started


def _ids(shape: Shape) -> torch.Tensor:
    """Ids [sequences, length]: the k-th with a probability proportional to 1/k, as in text, or uniform."""
    weights = torch.ones(shape.vocabulary)
    if not shape.flat:
        weights /= torch.arange(1, shape.vocabulary + 1)
    count = shape.micro_batch * shape.micro_batches
    drawn = weights.multinomial(count * shape.length, True, generator=torch.Generator().manual_seed(SEED))
    return drawn.view(count, shape.length)
