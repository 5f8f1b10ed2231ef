"""The generated section of docs/performance.md: `make performance`, or `python -m mlm_train.bench.page`.

The text between the marks is generated from docs/bench/train.*.json alone; the text around it is written by
hand.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlm_train.bench.train_show import Figures, lines_of, plot
from mlm_train.errors import UserError, escaped
from mlm_train.utils.files import write_text, writing
from mlm_train.utils.records import read_json

BEGIN, END = (
    f"<!-- {word} of what `make performance` writes from docs/bench -->" for word in ("begin", "end")
)
AIMS = {  # ratio -> its target, as a lower ("least") or upper bound ("most")
    "base_over_hf_eager": (1.15, "least"),
    "base_over_hf_compiled": (1.0, "least"),
    "memory_over_hf_eager": (1.5, "least"),
    "memory_over_hf_compiled": (1.3, "least"),
    "memory_ffn_cost_over_limit": (1.2, "most"),
    "memory_over_base_flop_limit": (0.85, "least"),
    "memory_over_base_flop_limit_in_whole_steps": (0.85, "least"),
    "flex3_over_base": (1.15, "least"),
    "table_over_per_token_activation_memory": (0.75, "most"),
}
ON_A_ALONE = ("memory_over_hf_eager", "memory_over_hf_compiled", "table_over_per_token_activation_memory")
ON_B_ALONE = ("flex3_over_base",)


def write_page(docs: Path) -> list[Path]:
    """Write the section and the plots. Returns the report files that they were made from."""
    files = sorted((docs / "bench").glob("train.*.json"))
    page = docs / "performance.md"
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} lacks the marks around the generated section: {BEGIN} {END}")
    sections = [_section(file) for file in files] or ["There are no reports yet."]
    with writing(page):
        write_text(page, "".join((before, BEGIN, "\n", "\n\n".join(sections), "\n", END, after)))
    return files


def _section(file: Path) -> str:
    """One shape in Markdown; its plot is written beside the report."""
    tree = _report(file)
    image = file.with_suffix(".png")
    plot(tree, image)
    figures = Figures(tree)
    parts = [
        f"### Shape {figures.preset}",
        f"    {tree['command']}",
        "```\n" + "\n".join(lines_of(tree)) + "\n```",
        f"![Speed of each variant, and of memory over base by tokens per step](bench/{image.name})",
        _aims(figures),
        _bounds(figures),
        f"All figures: [bench/{file.name}](bench/{file.name}).",
    ]
    return "\n\n".join(part for part in parts if part)


def _report(file: Path) -> dict[str, Any]:
    tree = read_json(file, "run the benchmark again")
    if not {"machine", "command", "rows", "ratios"} <= tree.keys() or not tree["rows"]:
        raise UserError(f"{file} is not a report of `mlm-train bench train`: run it again with --json {file}")
    return tree


def _aims(figures: Figures) -> str:
    """A table of ratios and their targets, for the ratios that this shape has."""
    elsewhere = {"a": ON_B_ALONE, "b": ON_A_ALONE}.get(figures.preset, ())
    lines = []
    for name, (aim, side) in AIMS.items():
        ratio = figures.ratios.get(f"{figures.preset}.{name}")
        if ratio is None or name in elsewhere:
            continue
        reached = ratio >= aim if side == "least" else ratio <= aim
        lines.append(f"| `{name}` | {ratio:.3f} | at {side} {aim} | {'yes' if reached else '**no**'} |")
    head = ["| ratio | measured | aim | reached |", "|---|---|---|---|"]
    return "\n".join(head + lines) if lines else ""


def _bounds(figures: Figures) -> str:
    """A list of what bounds each variant's speed, from its own figures."""
    lines = []
    for name in figures.variants:
        ends, same, at_peak = figures.shares(name)
        bounds = [f"matrix multiplications at peak speed would take {at_peak:.0%} of its time"]
        if same is not None:
            bounds.append(f"{same:.0%} of it is the time of the model without FFN")
        if ends > 0.01:
            bounds.append(f"{ends:.0%} are begin and finish, once per step")
        lines.append(f"- {name}: {'; '.join(bounds)}.")
    return "What bounds each figure:\n" + "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Write the section. arguments: the folder of the docs (default: docs). Returns the exit code."""
    try:
        files = write_page(Path(arguments[0] if arguments else "docs"))
    except (UserError, OSError) as error:
        print(f"mlm-train: {escaped(str(error))}", file=sys.stderr)
        return 2
    print(f"docs/performance.md: from {', '.join(file.name for file in files) or 'no reports yet'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
