"""`mlm-train tol allocate`: chooses how each layer is stored, within a budget or a tolerance."""

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
from mlm_train.tol.build.budget import warn_dropped
from mlm_train.tol.format.index import TolIndex
from mlm_train.tol.lowrank.knapsack import Mix
from mlm_train.tol.serve.reader import TableReader
from mlm_train.utils.files import check_output, is_png, write_figure, write_json, writing
from mlm_train.utils.units import in_units


def allocate(args: argparse.Namespace) -> int:
    """Measure, choose, write and show; return exit code 0."""
    if (args.budget is None) == (args.tolerance is None):
        raise UserError("give --budget or --tolerance")
    tolerance = None if args.tolerance is None else _fraction(args.tolerance)
    output, plot_file = _outputs(args)
    table = TableReader.open_plain(args.table, args.verify or "sizes")
    if args.budget is not None and args.budget < (least := _least_bytes(table.index)):
        raise _too_small(args.budget, least)
    study = Study(args, table, Console(stderr=True))
    mix = study.smallest(tolerance) if tolerance is not None else study.within(args.budget)
    if mix is None:
        raise _too_small(args.budget, study.least)
    layout = layout_of(table.index, study.of(mix))
    warn_dropped(table.index.layers, layout)
    measured = _measured(study, mix)
    tree = {
        "layers": layout.layers,
        "schemes": [scheme.model_dump(mode="json") for scheme in layout.schemes],
        "bytes": mix.bytes,
        "predicted_growth": math.expm1(mix.cost),
        "exact_perplexity": study.exact,
        "measured": measured,
        "sensitivities": study.costs.tolist(),
        "options": [None if option is None else option.model_dump(mode="json") for option in study.options],
        "pareto": [{"bytes": best.bytes, "predicted_growth": math.expm1(best.cost)} for best in study.front],
    }
    with writing(output):
        write_json(output, tree)
    study.notes.remove()
    _show(study, mix, measured)
    for line in _remarks(measured, tolerance):
        print(line)
    if plot_file is not None:
        _plot(study, measured, plot_file)
    print(f"{args.output}: `mlm-train tol compress {args.table} --allocation {args.output} --output DIR`")
    return 0


def _outputs(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The files for the mix and its plot; UserError before minutes of measuring."""
    output = check_output("--output", args.output, is_allocation, "file of `tol allocate`")
    if args.plot is None:
        return output, None
    plot_file = check_output("--plot", args.plot, is_png, "PNG")
    if plot_file.resolve() == output.resolve():
        raise UserError(f"--plot {plot_file} is --output too: name another file")
    return output, plot_file


def _least_bytes(index: TolIndex) -> int:
    """Bytes of the smallest possible table, of one layer."""
    options = (choice for choice in choices(index.hidden_size) if choice is not None)
    return min(size_of(index, {index.layers[0]: option}) for option in options)


def _too_small(budget: int, least: int) -> UserError:
    return UserError(
        f"--budget {in_units(budget)} is too small for any layer; give at least {in_units(least)}"
    )


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if value >= 1 and not text.endswith("%"):
        raise UserError(
            f"--tolerance {text} is {value:.0%}: write {text}%, or a fraction below 1 such as 0.005"
        )
    if not 0 <= value < 10:
        raise UserError(f"--tolerance {text}: give a fraction such as 0.5% or 0.005")
    return value


def _measured(study: Study, mix: Mix) -> dict[str, dict[str, float]]:
    """Bytes, perplexity and growth of the mix and of uniform tables."""
    tables = {"chosen": study.of(mix)} | study.uniform(mix.bytes)
    measured = {}
    for name, chosen in tables.items():
        perplexity = study.perplexity(chosen)
        growth = study.growth(perplexity)
        measured[name] = {"bytes": study.size(chosen), "perplexity": perplexity, "growth": growth}
    return measured


def _show(study: Study, mix: Mix, measured: dict[str, dict[str, float]]) -> None:
    console = Console()
    front = Columns("MB", "perplexity increase, predicted", "layers", title="best mixes")
    every = max(1, len(study.front) // 12)
    for best in study.front[::-every][::-1]:
        front.add_row(f"{best.bytes / 1e6:.3f}", f"{math.expm1(best.cost):+.3%}", _summary(study.of(best)))
    console.print(front)
    chosen = Columns("layer", "stored as", "cost, nats per token", title="chosen")
    for (layer, choice), pick, costs in zip(study.of(mix).items(), mix.picks, study.costs, strict=True):
        chosen.add_row(str(layer), describe(choice), f"{costs[pick]:.2e}")
    console.print(chosen)
    result = Columns("table", "MB", "perplexity", "increase", title="measured on the validation split")
    result.add_row("exact", f"{study.index.bytes / 1e6:.3f}", f"{study.exact:.4f}", "")
    for name, table in measured.items():
        size = f"{table['bytes'] / 1e6:.3f}"
        result.add_row(name, size, f"{table['perplexity']:.4f}", f"{table['growth']:+.3%}")
    console.print(result)


def _remarks(measured: dict[str, dict[str, float]], tolerance: float | None) -> list[str]:
    """Lines on measurements that contradict the choice, which was made by predictions."""
    chosen, remarks = measured["chosen"], []
    if tolerance is not None and chosen["growth"] > tolerance:
        remarks.append(f"no mix stays within {tolerance:.3%}: this is the largest, {chosen['growth']:+.3%}")
    for name, table in measured.items():
        if table["bytes"] <= chosen["bytes"] and table["perplexity"] < chosen["perplexity"]:
            remarks.append(
                f"measured better in no more bytes: {name} ({table['growth']:+.3%}, the chosen mix "
                f"{chosen['growth']:+.3%}); give more --samples for better predictions"
            )
    return remarks


def describe(choice: Choice) -> str:
    """Describe how a layer is stored, in a few words."""
    if choice is None:
        return "dropped"
    text = choice.dtype if choice.rank is None else f"rank {choice.rank} in {choice.dtype}"
    if choice.group_size is not None:
        text += f", groups of {choice.group_size}" + ("" if choice.symmetric else " with a zero")
    return text


def _summary(chosen: dict[int, Choice]) -> str:
    """The number of layers per choice."""
    counts: dict[str, int] = {}
    for choice in chosen.values():
        counts[describe(choice)] = counts.get(describe(choice), 0) + 1
    return "; ".join(f"{count} x {text}" for text, count in counts.items())


def _plot(study: Study, measured: dict[str, dict[str, float]], file: Path) -> None:
    """Plot perplexity increase against bytes: the best mixes as predicted, and the measured tables."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    front = [best for best in study.front if best.bytes]
    floor = 1e-5  # shown for 0 and less on the logarithmic axis
    predicted = [max(math.expm1(best.cost), floor) * 100 for best in front]
    axes.plot([best.bytes / 1e6 for best in front], predicted, label="best mixes, predicted", color="grey")
    for name, table in measured.items():
        height, marker = max(table["growth"], floor) * 100, "*" if name == "chosen" else "o"
        label = f"{name}, measured {table['growth']:+.3%}"
        axes.scatter(table["bytes"] / 1e6, height, marker=marker, label=label, zorder=3)
    axes.set_yscale("log")
    axes.set_xlabel("MB")
    axes.set_ylabel("perplexity increase, % (0.001 % and less at the bottom)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    write_figure(file, figure)
    pyplot.close(figure)
