"""`bench train`: speed, memory and FLOPs of a step of every variant of training, and of transformers' Llama.

Each variant has its own process. On a CPU all are alive at the same time, and one at a time runs one
micro-batch, alternating, so that other load on the machine affects all of them alike. A GPU holds one variant
at a time, and nobody else's load.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlm_train.bench import report, train_show
from mlm_train.bench.train_figures import (
    TrainFigures,
    VariantFigures,
    disagreements,
    ratios_of,
    rows_of,
    turns_of_passes,
)
from mlm_train.bench.train_presets import COMPILED, PRESETS, SEED, Preset, Variant, make_config
from mlm_train.bench.worker_process import WorkerProcess
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError
from mlm_train.model.counts import count_parameters
from mlm_train.monitor.resources import measured_peak_flops

UPDATES = 3  # optimizer steps timed
PROCESS_BYTES = 600 * 2**20  # of torch and its libraries
LOGITS = 6  # fp32 copies of a micro-batch's logits that the running variant may need


@dataclass(frozen=True)
class Options:
    """The command's options."""

    preset: str
    data: str
    precision: str
    runs: int  # timed micro-batches of each variant
    variants: Sequence[str] | None = None
    steps_of: Sequence[int] | None = None
    validate: Sequence[str] | None = None
    compile: bool = False
    device: str = "cpu"
    tokens: int | None = None  # per step; None: the preset's
    passes: int = 3  # timed begins, finishes and whole steps; micro-batches are spread over them
    json: str | None = None
    plot: str | None = None


@dataclass(frozen=True)
class BenchPlan:
    """Resolved and checked options."""

    preset: Preset
    data: PreparedData
    variants: list[Variant]
    sizes: list[int]  # tokens per step, other than the preset's own
    validated: list[str]

    def at_once(self, device: str) -> "list[BenchPlan]":
        """Its parts, of variants that are alive at the same time: a GPU holds one."""
        return [self] if device == "cpu" else [replace(self, variants=[each]) for each in self.variants]


def bench_train(options: Options) -> int:
    """Measure, print and write the report. Returns 1 if variants of one function disagree, else 0."""
    plan = _checked(options)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    machine = report.machine(options.device)
    notes: list[str] = []
    records: dict[str, VariantFigures] = {}
    for part in plan.at_once(options.device):
        with ExitStack() as stack:
            variants = Variants.start(part, options, stack, notes)
            records |= variants.measure(options.runs, min(options.passes, options.runs))
    distinct = _distinct(plan)
    micro = distinct.pop(plan.preset.micro_tokens)
    peak = measured_peak_flops(torch.device(options.device), options.precision)
    measured = TrainFigures(plan.preset, options.precision, options.data, records, micro, distinct, peak)
    notes += train_show.notes(measured, options.runs, plan.data.fingerprint)
    if options.device != "cpu":
        notes.append(train_show.ON_A_DEVICE)
    faults = disagreements(measured)
    rows, ratios = rows_of(measured), ratios_of(measured)
    tree = {"machine": machine, "rows": rows, "ratios": ratios, "notes": notes}
    train_show.show(tree, faults)
    if options.json is not None:
        report.write_report(Path(options.json), machine, rows, ratios, notes + faults)
    if options.plot is not None:
        train_show.plot(tree, Path(options.plot))
    return int(bool(faults))


def _checked(options: Options) -> BenchPlan:
    """Resolve the options. UserError for everything that can be checked before a process starts."""
    if options.preset not in PRESETS:
        raise UserError(f"--preset {options.preset}: choose from {', '.join(PRESETS)}")
    preset = PRESETS[options.preset]
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if options.tokens is not None:
        preset = replace(preset, tokens=options.tokens)
    for name in ("runs", "passes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: give at least 1")
    for name in ("json", "plot"):
        file = getattr(options, name)
        if file is not None:
            report.check_writable(Path(file), f"--{name}")
    names = list(dict.fromkeys(options.variants or preset.variants))
    if options.compile:
        names += [f"{name}{COMPILED}" for name in names if not name.startswith("hf.")]
    variants = [Variant.named(name) for name in names]
    validated = list(options.validate if options.validate is not None else preset.validated)
    if unknown := [name for name in options.validate or () if name not in names]:
        raise UserError(f"--validate {unknown[0]}: not one of the variants {', '.join(names)}")
    sizes = [size for size in options.steps_of or preset.steps_of if size != preset.tokens]
    for option, size in (("--tokens", preset.tokens), *(("--steps-of", size) for size in sizes)):
        if size < 1 or size % preset.micro_tokens:
            fix = f"give multiples of a micro-batch's {preset.micro_tokens} tokens"
            raise UserError(f"{option} {size}: {fix}")
    data = _checked_data(options.data, preset, max([preset.tokens, *sizes]))
    _check_memory(preset, variants, options)
    return BenchPlan(preset, data, variants, sizes, [name for name in validated if name in names])


def _checked_data(folder: str, preset: Preset, tokens: int) -> PreparedData:
    data = PreparedData.open(folder)
    if data.vocab_size != preset.vocabulary:
        raise UserError(
            f"--data {folder} has a vocabulary of {data.vocab_size}, but --preset {preset.name} needs "
            f"{preset.vocabulary}: prepare it with --tokenizer train:{preset.vocabulary}"
        )
    samples = Samples(data.split("train"), preset.sequence, SEED)
    if samples.samples_per_epoch * preset.sequence < tokens:
        raise UserError(f"--data {folder} has less than a step of {tokens} tokens: prepare more text")
    return data


def _check_memory(preset: Preset, variants: Sequence[Variant], options: Options) -> None:
    """Raise UserError where memory does not suffice: all processes hold weights and gradients, one runs.

    On a GPU there is one process.
    """
    on_cpu = options.device == "cpu"
    count = len(variants) if on_cpu else 1
    config = make_config(preset, Variant.named("base"), options.data, options.precision, preset.tokens)
    weights = 4 * count_parameters(config.model).stored
    needed = count * (2 * weights + PROCESS_BYTES) + 2 * weights
    needed += LOGITS * 4 * preset.micro_tokens * preset.vocabulary
    if on_cpu:
        free = psutil.virtual_memory().available
    else:
        free, _ = torch.get_device_module(options.device).mem_get_info()
    if needed > free:
        need, fix = f"{count} variants need", "choose some with --variants"
        if not on_cpu:
            need, fix = "a variant needs", "choose a smaller one"
        raise UserError(
            f"--preset {preset.name}: {need} about {needed / 2**30:.1f} GiB, but "
            f"{free / 2**30:.1f} are free; {fix}"
        )


def _distinct(plan: BenchPlan) -> dict[int, float]:
    """Distinct ids / tokens of the measured step's micro-batches (mean), and of steps of each size."""
    preset = plan.preset
    samples = Samples(plan.data.split("train"), preset.sequence, SEED)

    def ratio(first: int, tokens: int) -> float:
        ids, _ = samples.batch(first // preset.sequence, tokens // preset.sequence)
        return ids.unique().numel() / tokens

    by_tokens = {tokens: ratio(0, tokens) for tokens in (preset.tokens, *plan.sizes)}
    micro = [ratio(first, preset.micro_tokens) for first in range(0, preset.tokens, preset.micro_tokens)]
    return by_tokens | {preset.micro_tokens: sum(micro) / len(micro)}


class VariantProcess(WorkerProcess):
    """The process of a variant."""

    def __init__(self, variant: Variant, order: dict[str, Any]) -> None:
        super().__init__(variant.name, "bench", "train", "--worker")
        self.variant = variant
        self.send(order | {"do": "build", "variant": variant.name})


class Variants:
    """The processes of all variants, and the measurements so far."""

    def __init__(self, plan: BenchPlan, processes: list[VariantProcess], bar: Progress) -> None:
        self.plan, self.processes, self.bar = plan, processes, bar
        self.records: dict[str, VariantFigures] = {}

    @classmethod
    def start(cls, plan: BenchPlan, options: Options, stack: ExitStack, notes: list[str]) -> "Variants":
        """Build and warm up all. transformers' and compiled variants that fail are left out with a note."""
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = stack.enter_context(Progress(*columns, console=console))
        order = {
            "preset": plan.preset.name,
            "tokens": plan.preset.tokens,
            "data": options.data,
            "precision": options.precision,
            "device": options.device,
        }
        processes = []
        for variant in plan.variants:
            processes.append(VariantProcess(variant, order))
            stack.callback(processes[-1].kill)
        variants = cls(plan, processes, bar)
        task = bar.add_task("building and warming up", total=len(processes))
        for process in processes.copy():
            try:
                variants.records[process.variant.name] = VariantFigures(process.answer())
                variants.warm_up(process)
            except UserError as error:
                if process.variant.family != "hf" and not process.variant.compiled:
                    raise
                notes.append(f"not measured: {error}")
                console.print(f"not measured: {error}", markup=False)
                variants.records.pop(process.variant.name, None)
                processes.remove(process)
                process.kill()
            bar.advance(task)
        return variants

    def warm_up(self, process: VariantProcess) -> None:
        """Run a short step: kernels are chosen, gradients allocated, compiled variants compiled."""
        process.ask("begin", tokens=self.plan.preset.tokens)
        self.records[process.variant.name].loss = process.ask("run", number=0)["loss"]
        if process.variant.compiled:
            process.ask("run", number=1)
        process.ask("finish")
        process.ask("zero")

    def measure(self, runs: int, passes: int) -> dict[str, VariantFigures]:
        """Run all measurements, in an order that lets processes end early."""
        preset = self.plan.preset
        alike = len(self.processes) * (runs + 2 * passes)
        ends = 2 * passes * len(self.plan.sizes) * len(self._sized())
        wholes, last = passes * len(self.plan.validated), 2 * len(self.processes)
        self.task = self.bar.add_task("measuring", total=alike + ends + wholes + last)
        for number, turns in enumerate(turns_of_passes(runs, passes)):
            self._pass(preset.tokens, self.processes, turns, first=number == 0)
            self._in_turn(self._validated(), number, self._whole)
        for size in self.plan.sizes:
            for _ in range(passes):
                self._pass(size, self._sized(), range(0))
        for process in self.processes:
            self._state(process)
        return self.records

    def _validated(self) -> list[VariantProcess]:
        """The variants whose whole steps are timed too, after each pass, under the same load."""
        return [process for process in self.processes if process.variant.name in self.plan.validated]

    def _sized(self) -> list[VariantProcess]:
        """The variants whose begin and finish are timed at other step sizes too."""
        return [process for process in self.processes if process.variant.family in ("base", "memory")]

    def _pass(
        self, tokens: int, processes: list[VariantProcess], numbers: range, first: bool = False
    ) -> None:
        """Run begin, some micro-batches of a step, and finish, alternating over the variants."""

        def begin(process: VariantProcess, record: VariantFigures) -> None:
            record.begin.setdefault(tokens, []).append(process.ask("begin", tokens=tokens)["seconds"])

        def finish(process: VariantProcess, record: VariantFigures) -> None:
            record.finish.setdefault(tokens, []).append(process.ask("finish")["seconds"])
            if first:
                record.norm = process.ask("norm")["norm"]

        self._in_turn(processes, numbers.start, begin)
        for number in numbers:
            self._in_turn(processes, number, partial(_run, number))
        self._in_turn(processes, numbers.stop, finish)

    def _in_turn(
        self,
        processes: list[VariantProcess],
        start: int,
        work: Callable[[VariantProcess, VariantFigures], None],
    ) -> None:
        """Run `work` on each variant, one at a time; each round starts with another one."""
        shift = start % max(1, len(processes))
        for process in processes[shift:] + processes[:shift]:
            self.bar.update(self.task, description=f"measuring {process.variant.name}")
            work(process, self.records[process.variant.name])
            self.bar.advance(self.task)

    def _whole(self, process: VariantProcess, record: VariantFigures) -> None:
        record.whole.append(process.ask("whole", tokens=self.plan.preset.tokens)["seconds"])

    def _state(self, process: VariantProcess) -> None:
        """Measure what needs the optimizer's state, then end the process: not all fit in memory with it."""
        record = self.records[process.variant.name]
        self.bar.update(self.task, description=f"optimizer and memory of {process.variant.name}")
        record.update = process.ask("update", runs=UPDATES)["seconds"]
        self.bar.advance(self.task)
        record.memory = process.ask("memory", tokens=self.plan.preset.tokens)
        process.end()
        self.bar.advance(self.task)


def _run(number: int, process: VariantProcess, record: VariantFigures) -> None:
    answer = process.ask("run", number=number)
    record.run.append(answer["seconds"])
    record.processor.append(answer["processor"])
