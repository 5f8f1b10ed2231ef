"""Rows and ratios computed from the measurements of `bench train`; all formulas are here."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlm_train.bench import report
from mlm_train.bench.train_presets import COMPILED, Preset, Variant, flops_per_token, make_config

Row = dict[str, Any]
PARTS = ("weights", "gradients", "optimizer", "tables", "activations", "runtime")
AGREE = {"fp32": 1e-5, "bf16": 2e-3}  # relative, of the first micro-batch's loss
NORMS_AGREE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of a step's gradient


@dataclass
class VariantFigures:
    """Measurements of a variant, in seconds and bytes."""

    built: dict[str, int]  # runtime, weights, parameters
    loss: float = float("nan")  # mean cross-entropy of the first micro-batch with the initial weights
    norm: float = float("nan")  # of the gradients of the first pass
    begin: dict[int, list[float]] = field(default_factory=dict)  # by tokens per step
    finish: dict[int, list[float]] = field(default_factory=dict)
    run: list[float] = field(default_factory=list)  # micro-batches
    processor: list[float] = field(default_factory=list)  # CPU time of micro-batches, all threads
    whole: list[float] = field(default_factory=list)  # whole steps
    update: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def seconds(self, tokens: int, micro_batches: int, run: float | None = None) -> float:
        """Seconds of a step: begin + micro-batches x run (default: the median) + finish."""
        one = statistics.median(self.run) if run is None else run
        ends = (statistics.median(part.get(tokens, [0.0])) for part in (self.begin, self.finish))
        return sum(ends) + micro_batches * one


def turns_of_passes(runs: int, passes: int) -> list[range]:
    """The timed micro-batches of each pass: `runs` spread over `passes`."""
    return [range(runs * n // passes, runs * (n + 1) // passes) for n in range(passes)]


@dataclass(frozen=True)
class TrainFigures:
    """The measurements of a whole benchmark."""

    preset: Preset
    precision: str
    data: str
    records: Mapping[str, VariantFigures]
    distinct_micro: float  # distinct ids / tokens, mean over the micro-batches of the step
    distinct: Mapping[int, float]  # distinct ids / tokens of a step, by its tokens
    product_peak: float  # FLOP/s of a square matrix multiplication

    def speeds(self, name: str, tokens: int | None = None) -> list[float]:
        """Tokens per second without the optimizer, one value per timed micro-batch."""
        tokens, record = tokens or self.preset.tokens, self.records[name]
        count = tokens // self.preset.micro_tokens
        return [tokens / record.seconds(tokens, count, run) for run in record.run]

    def speed(self, name: str, tokens: int | None = None) -> float:
        """Median of `speeds`."""
        return statistics.median(self.speeds(name, tokens))

    def flops(self, name: str, recomputed: bool = True, tokens: int | None = None) -> float:
        """FLOPs of a step, by formula."""
        preset, variant, tokens = self.preset, Variant.named(name), tokens or self.preset.tokens
        config = make_config(preset, variant, self.data, self.precision, tokens)
        distinct = {"step": self.distinct[tokens], "micro": self.distinct_micro}
        return tokens * flops_per_token(variant, config, distinct, recomputed)

    def over_limit(self, name: str, base: str) -> float:
        """Speed relative to base's, divided by `flop_ratio`."""
        return self.ratio(name, base) / self.flop_ratio(name, base)

    def flop_ratio(self, name: str, base: str) -> float:
        """base's FLOPs over this variant's, without recomputation."""
        return self.flops(base, recomputed=False) / self.flops(name, recomputed=False)

    def ratio(self, name: str, base: str, tokens: int | None = None) -> float:
        """Speed relative to another variant's: the median over turns, in each of which both ran once.

        The machine's own speed may change by half within minutes, but affects all variants of a turn.
        """
        pairs = zip(self.speeds(name, tokens), self.speeds(base, tokens), strict=True)
        return statistics.median(own / other for own, other in pairs)

    def ffn_cost(self, name: str, base: str, without: str) -> float:
        """Cost of this variant's FFN relative to base's; the median over turns."""
        turns = zip(*(self.speeds(variant) for variant in (name, base, without)), strict=True)
        return statistics.median((1 / own - 1 / no) / (1 / full - 1 / no) for own, full, no in turns)

    def whole_step(self, name: str) -> float:
        """Median seconds of whole steps."""
        return statistics.median(self.records[name].whole)

    def ratio_of_whole_steps(self, name: str, base: str) -> float:
        """Speed of whole steps relative to another variant's; the median over passes."""
        pairs = zip(self.records[name].whole, self.records[base].whole, strict=True)
        return statistics.median(other / own for own, other in pairs)

    def deviations(self, name: str) -> list[float]:
        """Relative deviation of the sum of a step's parts from the time of each whole step.

        Each whole step is compared with the mean of the parts before and after it (the last one with those
        before), so that a drift of the machine's speed has no bias.
        """
        record, tokens = self.records[name], self.preset.tokens
        passes = turns_of_passes(len(record.run), len(record.whole))
        parts = []
        for turns, begin, finish in zip(passes, record.begin[tokens], record.finish[tokens], strict=True):
            run = statistics.median(record.run[turns.start : turns.stop])
            parts.append(begin + tokens // self.preset.micro_tokens * run + finish)
        after = [*parts[1:], parts[-1]]
        return [(p + q) / 2 / whole - 1 for p, q, whole in zip(parts, after, record.whole, strict=True)]

    def activations(self, name: str) -> int:
        """Activation bytes: peak of a step before its optimizer, less everything measured separately."""
        record = self.records[name]
        named = ("gradients", "optimizer", "tables")
        held = record.built["weights"] + record.built["runtime"] + sum(record.memory[part] for part in named)
        return record.memory["peak"] - held

    def beyond_state(self, name: str) -> int:
        """Peak bytes less weights, gradients, optimizer and runtime: activations and tables."""
        return self.activations(name) + self.records[name].memory["tables"]

    @property
    def best(self) -> str | None:
        """The fastest variant of a memory model."""
        names = [name for name in self.records if Variant.named(name).family == "memory"]
        return max(names, key=self.speed, default=None)

    def fastest(self, stem: str) -> str | None:
        """The fastest variant of a stem such as `flex3`; a compiled one, if any, if `best` is compiled."""
        candidates = [name for name in self.records if name == stem or name.startswith(f"{stem}.")]
        compiled = self.best is not None and self.best.endswith(COMPILED)
        alike = [name for name in candidates if name.endswith(COMPILED) == compiled]
        return max(alike or candidates, key=self.speed, default=None)


def rows_of(figures: TrainFigures) -> list[Row]:
    """Report rows of all measurements and counts, named `PRESET.VARIANT.FIGURE`."""
    preset, start = figures.preset, figures.preset.name
    rows = [
        report.row(f"{start}.distinct_of_{tokens}", [ratio], "ids/token")
        for tokens, ratio in sorted({preset.micro_tokens: figures.distinct_micro, **figures.distinct}.items())
    ]
    rows.append(report.row(f"{start}.product_peak", [figures.product_peak], "FLOP/s"))
    base = figures.fastest("base")
    for name, record in figures.records.items():
        begin = f"{start}.{name}"
        speed, flops = figures.speeds(name), figures.flops(name)
        rows.append(report.row(f"{begin}.speed", speed, "tokens/s"))
        for tokens in sorted(record.finish.keys() - {preset.tokens}):
            rows.append(report.row(f"{begin}.speed_of_{tokens}", figures.speeds(name, tokens), "tokens/s"))
        rows += [
            report.row(f"{begin}.step", [preset.tokens / value for value in speed], "s"),
            report.row(f"{begin}.begin", record.begin[preset.tokens], "s"),
            report.row(f"{begin}.micro_batch", record.run, "s"),
            report.row(f"{begin}.micro_batch_processor", record.processor, "s"),
            report.row(f"{begin}.finish", record.finish[preset.tokens], "s"),
            report.row(f"{begin}.optimizer", record.update, "s"),
            report.row(f"{begin}.flops", [flops], "FLOP/step"),
            report.row(f"{begin}.achieved", [flops / preset.tokens * value for value in speed], "FLOP/s"),
            report.row(f"{begin}.parameters", [record.built["parameters"]], "elements"),
            report.row(f"{begin}.loss", [record.loss], "nats"),
        ]
        if base is not None:
            rows.append(report.row(f"{begin}.over_limit", [figures.over_limit(name, base)], "ratio"))
        if record.whole:
            rows += [
                report.row(f"{begin}.whole_step", record.whole, "s"),
                report.row(f"{begin}.whole_step_deviation", figures.deviations(name), "ratio"),
            ]
        parts = record.built | record.memory | {"activations": figures.activations(name)}
        rows += [report.row(f"{begin}.memory.{part}", [parts[part]], "bytes") for part in PARTS]
        rows.append(report.row(f"{begin}.memory.peak", [parts["peak_with_update"]], "bytes"))
    return rows


def ratios_of(figures: TrainFigures) -> dict[str, float]:
    """The ratios of the report, without those whose variants were not measured."""
    ratios: dict[str, float] = {}
    base, memory, noffn = figures.fastest("base"), figures.best, figures.fastest("noffn")
    for name, variant in (("base", base), ("memory", memory)):
        for peer in ("eager", "compiled"):
            if variant is not None and f"hf.{peer}" in figures.records:
                ratios[f"{name}_over_hf_{peer}"] = figures.ratio(variant, f"hf.{peer}")
    if base is not None and memory is not None:
        ratios["memory_over_base"] = figures.ratio(memory, base)
        ratios["memory_over_base_flop_limit"] = figures.over_limit(memory, base)
        if figures.records[base].whole and figures.records[memory].whole:
            ratio = figures.ratio_of_whole_steps(memory, base)
            ratios["memory_over_base_in_whole_steps"] = ratio
            ratios["memory_over_base_flop_limit_in_whole_steps"] = ratio / figures.flop_ratio(memory, base)
        ratios |= _by_size(figures, base)
    if base is not None and memory is not None and noffn is not None:
        cost = figures.ffn_cost(memory, base, noffn)
        ratios["memory_ffn_cost_over_limit"] = cost / (4 / 3 * figures.distinct[figures.preset.tokens])
    flex = figures.fastest("flex3")
    if base is not None and flex is not None:
        ratios["flex3_over_base"] = figures.ratio(flex, base)
    pairs = [(f"memory.table{end}", f"memory.per_token{end}") for end in ("", COMPILED)]
    if pair := next((pair for pair in pairs if {*pair} <= figures.records.keys()), None):
        beyond, apart = (
            [held(name) for name in pair] for held in (figures.beyond_state, figures.activations)
        )
        # Everything except weights, gradients, optimizer and runtime, and the same without tables.
        ratios["table_over_per_token_activation_memory"] = beyond[0] / beyond[1]
        ratios["table_over_per_token_activation_memory_tables_apart"] = apart[0] / apart[1]
    return {f"{figures.preset.name}.{name}": value for name, value in ratios.items()}


def _by_size(figures: TrainFigures, base: str) -> dict[str, float]:
    """Ratios of the best memory variant to base, at each step size."""
    ratios = {}
    for tokens in sorted(figures.distinct):
        names = [
            name
            for name, record in figures.records.items()
            if Variant.named(name).family == "memory" and tokens in record.finish
        ]
        if names and tokens in figures.records[base].finish:
            best = max(names, key=lambda name: figures.speed(name, tokens))
            flops = [figures.flops(name, recomputed=False, tokens=tokens) for name in (base, best)]
            ratios[f"memory_over_base_of_{tokens}"] = figures.ratio(best, base, tokens)
            ratios[f"memory_over_base_by_flops_of_{tokens}"] = flops[0] / flops[1]
    return ratios


def disagreements(figures: TrainFigures) -> list[str]:
    """Messages about variants of one function whose losses or gradients differ."""
    groups: dict[str, list[str]] = {}
    for name in figures.records:
        groups.setdefault(Variant.named(name).peers, []).append(name)
    lines = []
    for names in groups.values():
        for what, limit in (("loss", AGREE[figures.precision]), ("norm", NORMS_AGREE[figures.precision])):
            values = {name: getattr(figures.records[name], what) for name in names}
            first = values[names[0]]
            if not all(abs(value - first) <= limit * abs(first) for value in values.values()):  # NaN differs
                shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
                lines.append(f"{'losses' if what == 'loss' else 'gradient norms'} differ: {shown}")
    return lines
