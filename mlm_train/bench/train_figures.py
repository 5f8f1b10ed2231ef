"""What the measurements of `bench train` come to: rows and ratios, by formulas that stand here alone."""

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
    """What was measured of a variant; seconds, bytes."""

    built: dict[str, int]  # runtime, weights, parameters
    loss: float = float("nan")  # mean CE of the first micro-batch, first weights
    norm: float = float("nan")  # of the gradients of the first pass
    begin: dict[int, list[float]] = field(default_factory=dict)  # by tokens a step
    finish: dict[int, list[float]] = field(default_factory=dict)
    run: list[float] = field(default_factory=list)  # of a micro-batch
    processor: list[float] = field(default_factory=list)  # of a micro-batch, all threads
    whole: list[float] = field(default_factory=list)  # whole steps, each in one go
    update: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def seconds(self, tokens: int, micro_batches: int, run: float | None = None) -> float:
        """A step: begin + micro-batches x a micro-batch (default: the median) + finish."""
        one = statistics.median(self.run) if run is None else run
        ends = (statistics.median(part.get(tokens, [0.0])) for part in (self.begin, self.finish))
        return sum(ends) + micro_batches * one


def turns_of_passes(runs: int, passes: int) -> list[range]:
    """Which of so many timed micro-batches each pass has."""
    return [range(runs * n // passes, runs * (n + 1) // passes) for n in range(passes)]


@dataclass(frozen=True)
class TrainFigures:
    """A whole benchmark."""

    preset: Preset
    precision: str
    data: str
    records: Mapping[str, VariantFigures]
    distinct_micro: float  # distinct ids / tokens, mean over the micro-batches of the step
    distinct: Mapping[int, float]  # of a step of so many tokens
    product_peak: float  # FLOP/s of a square matrix product

    def speeds(self, name: str, tokens: int | None = None) -> list[float]:
        """Tokens a second without the optimizer, one for each timed micro-batch."""
        tokens, record = tokens or self.preset.tokens, self.records[name]
        count = tokens // self.preset.micro_tokens
        return [tokens / record.seconds(tokens, count, run) for run in record.run]

    def speed(self, name: str, tokens: int | None = None) -> float:
        """The median."""
        return statistics.median(self.speeds(name, tokens))

    def flops(self, name: str, recomputed: bool = True, tokens: int | None = None) -> float:
        """Of a step, by formula."""
        preset, variant, tokens = self.preset, Variant.named(name), tokens or self.preset.tokens
        config = make_config(preset, variant, self.data, self.precision, tokens)
        distinct = {"step": self.distinct[tokens], "micro": self.distinct_micro}
        return tokens * flops_per_token(variant, config, distinct, recomputed)

    def over_limit(self, name: str, base: str) -> float:
        """Speed over base's, divided by base's FLOPs over this one's, without recomputed ones."""
        return self.ratio(name, base) / self.flop_ratio(name, base)

    def flop_ratio(self, name: str, base: str) -> float:
        """base's FLOPs over this one's, without recomputed ones."""
        return self.flops(base, recomputed=False) / self.flops(name, recomputed=False)

    def ratio(self, name: str, base: str, tokens: int | None = None) -> float:
        """Speed over another's: the median over turns, in each of which both ran a micro-batch.

        The machine's own speed may change by half within minutes, and changes all variants' of a turn.
        """
        pairs = zip(self.speeds(name, tokens), self.speeds(base, tokens), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def ffn_cost(self, name: str, base: str, without: str) -> float:
        """What this one's FFN costs, over what base's costs; the median over turns."""
        turns = zip(*(self.speeds(some) for some in (name, base, without)), strict=True)
        return statistics.median((1 / mine - 1 / no) / (1 / full - 1 / no) for mine, full, no in turns)

    def whole_step(self, name: str) -> float:
        """Seconds in one go, the median."""
        return statistics.median(self.records[name].whole)

    def ratio_of_whole_steps(self, name: str, base: str) -> float:
        """Speed over another's, the median over passes."""
        pairs = zip(self.records[name].whole, self.records[base].whole, strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)

    def deviations(self, name: str) -> list[float]:
        """Of the sum of a step's parts from a whole step in one go, relative, for each whole step.

        Each is compared with the mean of the parts before and after it (the last one, which has none after
        it, with those before), so that a drift of the machine's speed does not lean to one side.
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
        """Peak of a step up to its optimizer less everything that has a name."""
        record = self.records[name]
        named = ("gradients", "optimizer", "tables")
        held = record.built["weights"] + record.built["runtime"] + sum(record.memory[part] for part in named)
        return record.memory["peak"] - held

    def beyond_state(self, name: str) -> int:
        """Peak less weights, gradients, optimizer and runtime: activations, and tables where there are."""
        return self.activations(name) + self.records[name].memory["tables"]

    @property
    def best(self) -> str | None:
        """The fastest execution of memory."""
        names = [name for name in self.records if Variant.named(name).family == "memory"]
        return max(names, key=self.speed, default=None)

    def fastest(self, stem: str) -> str | None:
        """The fastest variant of a stem such as `flex3`; compiled if the best memory is and there is one."""
        found = [name for name in self.records if name == stem or name.startswith(f"{stem}.")]
        compiled = self.best is not None and self.best.endswith(COMPILED)
        alike = [name for name in found if name.endswith(COMPILED) == compiled]
        return max(alike or found, key=self.speed, default=None)


def rows_of(found: TrainFigures) -> list[Row]:
    """Everything measured or counted, `PRESET.VARIANT.FIGURE`."""
    preset, start = found.preset, found.preset.name
    rows = [
        report.row(f"{start}.distinct_of_{tokens}", [ratio], "ids/token")
        for tokens, ratio in sorted({preset.micro_tokens: found.distinct_micro, **found.distinct}.items())
    ]
    rows.append(report.row(f"{start}.product_peak", [found.product_peak], "FLOP/s"))
    base = found.fastest("base")
    for name, record in found.records.items():
        begin = f"{start}.{name}"
        speed, flops = found.speeds(name), found.flops(name)
        rows.append(report.row(f"{begin}.speed", speed, "tokens/s"))
        for tokens in sorted(record.finish.keys() - {preset.tokens}):
            rows.append(report.row(f"{begin}.speed_of_{tokens}", found.speeds(name, tokens), "tokens/s"))
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
            rows.append(report.row(f"{begin}.over_limit", [found.over_limit(name, base)], "ratio"))
        if record.whole:
            rows += [
                report.row(f"{begin}.whole_step", record.whole, "s"),
                report.row(f"{begin}.whole_step_deviation", found.deviations(name), "ratio"),
            ]
        parts = record.built | record.memory | {"activations": found.activations(name)}
        rows += [report.row(f"{begin}.memory.{part}", [parts[part]], "bytes") for part in PARTS]
        rows.append(report.row(f"{begin}.memory.peak", [parts["peak_with_update"]], "bytes"))
    return rows


def ratios_of(found: TrainFigures) -> dict[str, float]:
    """The ratios that others read; those whose variants were not measured are left out."""
    ratios: dict[str, float] = {}
    base, memory, noffn = found.fastest("base"), found.best, found.fastest("noffn")
    for name, mine in (("base", base), ("memory", memory)):
        for peer in ("eager", "compiled"):
            if mine is not None and f"hf.{peer}" in found.records:
                ratios[f"{name}_over_hf_{peer}"] = found.ratio(mine, f"hf.{peer}")
    if base is not None and memory is not None:
        ratios["memory_over_base"] = found.ratio(memory, base)
        ratios["memory_over_base_flop_limit"] = found.over_limit(memory, base)
        if found.records[base].whole and found.records[memory].whole:
            ratio = found.ratio_of_whole_steps(memory, base)
            ratios["memory_over_base_in_whole_steps"] = ratio
            ratios["memory_over_base_flop_limit_in_whole_steps"] = ratio / found.flop_ratio(memory, base)
        ratios |= _by_size(found, base)
    if base is not None and memory is not None and noffn is not None:
        cost = found.ffn_cost(memory, base, noffn)
        ratios["memory_ffn_cost_over_limit"] = cost / (4 / 3 * found.distinct[found.preset.tokens])
    flex = found.fastest("flex3")
    if base is not None and flex is not None:
        ratios["flex3_over_base"] = found.ratio(flex, base)
    pairs = [(f"memory.table{end}", f"memory.per_token{end}") for end in ("", COMPILED)]
    if pair := next((pair for pair in pairs if {*pair} <= found.records.keys()), None):
        beyond, apart = ([held(name) for name in pair] for held in (found.beyond_state, found.activations))
        # The activations: all but weights, gradients, optimizer and runtime, so tables are in.
        ratios["table_over_per_token_activation_memory"] = beyond[0] / beyond[1]
        ratios["table_over_per_token_activation_memory_tables_apart"] = apart[0] / apart[1]
    return {f"{found.preset.name}.{name}": value for name, value in ratios.items()}


def _by_size(found: TrainFigures, base: str) -> dict[str, float]:
    """The best execution of memory over base at each size of a step."""
    ratios = {}
    for tokens in sorted(found.distinct):
        names = [
            name
            for name, record in found.records.items()
            if Variant.named(name).family == "memory" and tokens in record.finish
        ]
        if names and tokens in found.records[base].finish:
            best = max(names, key=lambda name: found.speed(name, tokens))
            flops = [found.flops(name, recomputed=False, tokens=tokens) for name in (base, best)]
            ratios[f"memory_over_base_of_{tokens}"] = found.ratio(best, base, tokens)
            ratios[f"memory_over_base_by_flops_of_{tokens}"] = flops[0] / flops[1]
    return ratios


def disagreements(found: TrainFigures) -> list[str]:
    """Variants of one function whose losses or gradients are not alike, in words."""
    groups: dict[str, list[str]] = {}
    for name in found.records:
        groups.setdefault(Variant.named(name).peers, []).append(name)
    lines = []
    for names in groups.values():
        for what, limit in (("loss", AGREE[found.precision]), ("norm", NORMS_AGREE[found.precision])):
            values = {name: getattr(found.records[name], what) for name in names}
            first = values[names[0]]
            if not all(abs(value - first) <= limit * abs(first) for value in values.values()):  # NaN differs
                shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
                lines.append(f"{'losses' if what == 'loss' else 'gradient norms'} differ: {shown}")
    return lines
