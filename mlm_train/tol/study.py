"""`mlm-train tol allocate`: how each layer is stored within a budget or a tolerance, chosen and measured."""

import argparse
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table as Columns

from mlm_train.errors import UserError
from mlm_train.evaluate.scorer import Scorer
from mlm_train.files import check_output, is_png, sha256_of, write_figure, write_json, writing
from mlm_train.sizes import in_units
from mlm_train.tol.allocate import best_kept, best_mixes, choices, layout_of, room_of, size_of, ways_of
from mlm_train.tol.format import INDEX, TolIndex, check_fits
from mlm_train.tol.knapsack import Mix
from mlm_train.tol.lowrank import say_dropped
from mlm_train.tol.options import is_allocation
from mlm_train.tol.schemes import ALIGNMENT, GROUP, Scheme
from mlm_train.tol.sensitivities import Choice, Notes, Trial, measure, spectra_of
from mlm_train.tol.table import Table


class Study:
    """The table, the model, and what each choice of each layer costs."""

    def __init__(self, args: argparse.Namespace, table: Table, console: Console) -> None:
        self.table, self.index = table, table.index
        numbers = {"length": args.sequence_length, "micro_batch": args.micro_batch}
        self.scorer = Scorer(args.model, args.data, **numbers, verify=args.verify)
        learnt = self.scorer.windows_of("train", args.samples)
        check_fits(Path(args.table), self.index, self.scorer.config)
        self.trial = Trial(self.table, spectra_of(self.table))
        self.options = choices(self.index.hidden_size)

        def shown(numbers: Iterable[int]) -> Iterable[int]:
            hidden = not console.is_terminal
            return track(numbers, "sensitivities", console=console, disable=hidden, transient=True)

        batches = list(learnt.batches())
        self.notes = self._notes(args)
        self.costs = measure(self.scorer.model, self.trial, batches, self.options, shown, self.notes)
        self.ways = ways_of(self.costs, self.index.vocab_size, self.index.hidden_size)
        self.front = [self._with_headers(mix) for mix in best_mixes(self.ways)]
        if not self.front:
            raise UserError(
                f"no layer of {args.table} changes what {args.model} says of {args.data}: "
                "there is nothing to choose from; give more --samples"
            )
        self.exact = self.perplexity({})

    def _notes(self, args: argparse.Namespace) -> Notes:
        """Of this table, model, text and these ways to store."""
        table = sha256_of(Path(args.table) / INDEX)
        ways = [None if one is None else one.model_dump(mode="json") for one in self.options]
        text = [self.scorer.data.fingerprint, args.samples, args.sequence_length, args.micro_batch]
        return Notes(Path(args.output), [table, self.scorer.fingerprint, text, ways])

    def size(self, chosen: Mapping[int, Choice]) -> int:
        """Bytes of a table's files."""
        return size_of(self.index, chosen)

    def perplexity(self, chosen: dict[int, Choice]) -> float:
        """Measured on the validation split."""
        self.trial.chosen = chosen
        try:
            return self.scorer.score(self.trial).perplexity
        finally:
            self.trial.chosen = {}

    def of(self, mix: Mix) -> dict[int, Choice]:
        """A mix' choice for each layer."""
        picks = (self.options[pick] for pick in mix.picks)
        return dict(zip(self.index.layers, picks, strict=True))

    def growth(self, perplexity: float) -> float:
        """Against exact lookups, as a fraction."""
        return perplexity / self.exact - 1

    def _with_headers(self, mix: Mix) -> Mix:
        return mix._replace(bytes=self.size(self.of(mix)))

    def within(self, budget: int) -> Mix | None:
        """The best mix of a table of at most so many bytes; None where nothing that helps fits."""
        mix = best_kept(self.ways, room_of(self.index, budget))
        return None if mix is None else self._with_headers(mix)

    def smallest(self, tolerance: float) -> Mix:
        """The smallest of the best mixes whose measured perplexity grows by no more, by bisection.

        To within the bytes that a layer's padding takes; the largest one where none does so.
        """
        found, measured = self.front[-1], dict[Mix, float]()
        low, high = 0, found.bytes
        while high - low > self.index.vocab_size * ALIGNMENT:
            middle = (low + high) // 2
            mix = self.within(middle)
            if mix is not None and mix not in measured:
                measured[mix] = self.growth(self.perplexity(self.of(mix)))
            if mix is not None and measured[mix] <= tolerance:
                found, high = mix, min(middle, mix.bytes)
            else:
                low = middle
        return found

    @property
    def least(self) -> int:
        """Bytes of the smallest table that costs less than dropping all layers."""
        smaller = [one.bytes[one.costs < one.costs[0]] for one in self.ways]
        room = min(int(sizes.min()) for sizes in smaller if len(sizes))
        return room - room_of(self.index, 0)

    def uniform(self, size: int) -> dict[str, dict[int, Choice]]:
        """Every layer alike: int8, int4, and the largest rank in bfloat16 that fits into so many bytes."""
        layers, hidden = self.index.layers, self.index.hidden_size
        found: dict[str, Choice] = {
            f"{dtype}, groups of {group}": Scheme(dtype=dtype, group_size=group)
            for dtype, group in (("int8", GROUP), ("int4", GROUP), ("int4", GROUP // 2))
        }

        def cut(rank: int) -> Scheme:
            return Scheme(dtype="bfloat16", rank=rank)

        ranks = range(1, hidden)
        if rank := bisect_right(ranks, size, key=lambda rank: self.size(dict.fromkeys(layers, cut(rank)))):
            found[f"rank {rank}, bfloat16"] = cut(rank)
        return {name: dict.fromkeys(layers, choice) for name, choice in found.items()}


def allocate(args: argparse.Namespace) -> int:
    """Measure, choose, show, write."""
    if (args.budget is None) == (args.tolerance is None):
        raise UserError("give --budget or --tolerance")
    tolerance = None if args.tolerance is None else _fraction(args.tolerance)
    output, drawn = _outputs(args)
    table = Table.open_folder(args.table, verify=args.verify or "sizes")
    if table.index.encodings is not None:
        raise UserError(f"{args.table} is compressed already; give the table that `tol build` wrote")
    if args.budget is not None and args.budget < (least := _least_bytes(table.index)):
        raise _too_small(args.budget, least)
    study = Study(args, table, Console(stderr=True))
    mix = study.smallest(tolerance) if tolerance is not None else study.within(args.budget)
    if mix is None:
        raise _too_small(args.budget, study.least)
    layout = layout_of(table.index, study.of(mix))
    say_dropped(table.index.layers, layout)
    measured = _measured(study, mix)
    tree = {
        "layers": layout.layers,
        "schemes": [scheme.model_dump(mode="json") for scheme in layout.schemes],
        "bytes": mix.bytes,
        "predicted_growth": math.expm1(mix.cost),
        "exact_perplexity": study.exact,
        "measured": measured,
        "sensitivities": study.costs.tolist(),
        "options": [None if one is None else one.model_dump(mode="json") for one in study.options],
        "pareto": [{"bytes": one.bytes, "predicted_growth": math.expm1(one.cost)} for one in study.front],
    }
    with writing(output):
        write_json(output, tree)
    study.notes.remove()
    _show(study, mix, measured)
    for line in _remarks(measured, tolerance):
        print(line)
    if drawn is not None:
        _plot(study, mix, measured, drawn)
    print(f"{args.output}: `mlm-train tol compress {args.table} --allocation {args.output} --output DIR`")
    return 0


def _outputs(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Where the mix and its plot go; UserError before minutes of measuring."""
    output = check_output("--output", args.output, is_allocation, "file of `tol allocate`")
    if args.plot is None:
        return output, None
    drawn = check_output("--plot", args.plot, is_png, "PNG")
    if drawn.resolve() == output.resolve():
        raise UserError(f"--plot {drawn} is --output too: name another file")
    return output, drawn


def _least_bytes(index: TolIndex) -> int:
    """Of the smallest table there can be: one layer."""
    ways = (option for option in choices(index.hidden_size) if option is not None)
    return min(size_of(index, {index.layers[0]: way}) for way in ways)


def _too_small(budget: int, least: int) -> UserError:
    return UserError(f"--budget {in_units(budget)} holds no layer; the smallest mix takes {in_units(least)}")


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if value >= 1 and not text.endswith("%"):
        raise UserError(f"--tolerance {text} is {value:.0%}: write {text}%, or a share below 1 such as 0.005")
    if not 0 <= value < 10:
        raise UserError(f"--tolerance {text}: give a share such as 0.5% or 0.005")
    return value


def _measured(study: Study, mix: Mix) -> dict[str, dict[str, float]]:
    """The mix and uniform ways: bytes, perplexity, growth."""
    ways = {"chosen": study.of(mix)} | study.uniform(mix.bytes)
    found = {}
    for name, chosen in ways.items():
        perplexity = study.perplexity(chosen)
        growth = study.growth(perplexity)
        found[name] = {"bytes": study.size(chosen), "perplexity": perplexity, "growth": growth}
    return found


def _show(study: Study, mix: Mix, measured: dict[str, dict[str, float]]) -> None:
    console = Console()
    front = Columns("MB", "perplexity grows by, predicted", "layers", title="best mixes")
    every = max(1, len(study.front) // 12)
    for one in study.front[::-every][::-1]:
        front.add_row(f"{one.bytes / 1e6:.3f}", f"{math.expm1(one.cost):+.3%}", _words(study.of(one)))
    console.print(front)
    chosen = Columns("layer", "stored as", "costs, nats a token", title="chosen")
    for (layer, choice), pick, costs in zip(study.of(mix).items(), mix.picks, study.costs, strict=True):
        chosen.add_row(str(layer), words(choice), f"{costs[pick]:.2e}")
    console.print(chosen)
    result = Columns("way", "MB", "perplexity", "grows by", title="measured on the validation split")
    result.add_row("exact", f"{study.index.bytes / 1e6:.3f}", f"{study.exact:.4f}", "")
    for name, way in measured.items():
        size = f"{way['bytes'] / 1e6:.3f}"
        result.add_row(name, size, f"{way['perplexity']:.4f}", f"{way['growth']:+.3%}")
    console.print(result)


def _remarks(measured: dict[str, dict[str, float]], tolerance: float | None) -> list[str]:
    """Where measuring does not bear out the choice, which predictions made."""
    chosen, found = measured["chosen"], []
    if tolerance is not None and chosen["growth"] > tolerance:
        found.append(f"no mix stays within {tolerance:.3%}: this is the largest, {chosen['growth']:+.3%}")
    for name, way in measured.items():
        if way["bytes"] <= chosen["bytes"] and way["perplexity"] < chosen["perplexity"]:
            found.append(
                f"measured better in no more bytes: {name} ({way['growth']:+.3%}, the chosen mix "
                f"{chosen['growth']:+.3%}); more --samples predict better"
            )
    return found


def words(choice: Choice) -> str:
    """A way to store a layer, in a few words."""
    if choice is None:
        return "dropped"
    said = choice.dtype if choice.rank is None else f"rank {choice.rank} in {choice.dtype}"
    if choice.group_size is not None:
        said += f", groups of {choice.group_size}" + ("" if choice.symmetric else " with a zero")
    return said


def _words(chosen: dict[int, Choice]) -> str:
    """How many layers are stored how."""
    counts: dict[str, int] = {}
    for choice in chosen.values():
        counts[words(choice)] = counts.get(words(choice), 0) + 1
    return "; ".join(f"{count} x {said}" for said, count in counts.items())


def _plot(study: Study, mix: Mix, measured: dict[str, dict[str, float]], file: Path) -> None:
    """Growth of perplexity against bytes: the best mixes as predicted, and what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    front = [one for one in study.front if one.bytes]
    floor = 1e-5  # what a logarithmic axis can show of nothing
    predicted = [max(math.expm1(one.cost), floor) * 100 for one in front]
    axes.plot([one.bytes / 1e6 for one in front], predicted, label="best mixes, predicted", color="grey")
    for name, way in measured.items():
        height, marker = max(way["growth"], floor) * 100, "*" if name == "chosen" else "o"
        label = f"{name}, measured {way['growth']:+.3%}"
        axes.scatter(way["bytes"] / 1e6, height, marker=marker, label=label, zorder=3)
    axes.set_yscale("log")
    axes.set_xlabel("MB")
    axes.set_ylabel("perplexity grows by, % (0.001 % and less at the bottom)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)
