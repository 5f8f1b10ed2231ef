"""`mlm-train tol allocate`: how each layer is stored within a budget or a tolerance, chosen and measured."""

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table as Columns

from mlm_train.errors import UserError
from mlm_train.tol.allocate.mix_file import is_allocation
from mlm_train.tol.allocate.mixes import choices, layout_of, size_of
from mlm_train.tol.allocate.sensitivity import Choice
from mlm_train.tol.allocate.study import Study
from mlm_train.tol.build.budget import say_dropped
from mlm_train.tol.format.index import TolIndex
from mlm_train.tol.lowrank.knapsack import Mix
from mlm_train.tol.serve.reader import TableReader
from mlm_train.utils.files import check_output, is_png, write_figure, write_json, writing
from mlm_train.utils.units import in_units


def allocate(args: argparse.Namespace) -> int:
    """Measure, choose, show, write."""
    if (args.budget is None) == (args.tolerance is None):
        raise UserError("give --budget or --tolerance")
    tolerance = None if args.tolerance is None else _fraction(args.tolerance)
    output, drawn = _outputs(args)
    table = TableReader.open_folder(args.table, verify=args.verify or "sizes")
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
