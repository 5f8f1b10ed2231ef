"""The generated section of docs/performance.md: `make performance`, or `python -m mlm_train.bench.page`.

What stands between the marks comes from docs/bench/train.*.json alone; the words around it are people's.
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
AIMS = {  # ratio -> where it should be: at least, or at most
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
    """Write the section and the plots; the report files that it was made of."""
    files = sorted((docs / "bench").glob("train.*.json"))
    page = docs / "performance.md"
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} lacks the marks that the generated section stands between: {BEGIN} {END}")
    sections = [_section(file) for file in files] or ["No run is kept yet."]
    with writing(page):
        write_text(page, "".join((before, BEGIN, "\n", "\n\n".join(sections), "\n", END, after)))
    return files


def _section(file: Path) -> str:
    """One shape, in Markdown; its plot is drawn beside the report."""
    tree = _report(file)
    image = file.with_suffix(".png")
    plot(tree, image)
    figures = Figures(tree)
    parts = [
        f"### Shape {figures.preset}",
        f"    {tree['command']}",
        "```\n" + "\n".join(lines_of(tree)) + "\n```",
        f"![Speed of each variant, and of memory over base by tokens a step](bench/{image.name})",
        _aims(figures),
        _bounds(figures),
        f"All figures: [bench/{file.name}](bench/{file.name}).",
    ]
    return "\n\n".join(part for part in parts if part)


def _report(file: Path) -> dict[str, Any]:
    tree = read_json(file, "run the benchmark again")
    if not {"machine", "command", "rows", "ratios"} <= tree.keys() or not tree["rows"]:
        raise UserError(f"{file} is no report of `mlm-train bench train`: run it again with --json {file}")
    return tree


def _aims(figures: Figures) -> str:
    """Each ratio beside what it should be, where there is such a figure for this shape."""
    elsewhere = {"a": ON_B_ALONE, "b": ON_A_ALONE}.get(figures.preset, ())
    lines = []
    for name, (aim, side) in AIMS.items():
        found = figures.ratios.get(f"{figures.preset}.{name}")
        if found is None or name in elsewhere:
            continue
        reached = found >= aim if side == "least" else found <= aim
        lines.append(f"| `{name}` | {found:.3f} | at {side} {aim} | {'yes' if reached else '**no**'} |")
    head = ["| ratio | measured | aim | reached |", "|---|---|---|---|"]
    return "\n".join(head + lines) if lines else ""


def _bounds(figures: Figures) -> str:
    """What bounds each variant's speed, from its own figures."""
    lines = []
    for name in figures.variants:
        ends, same, at_peak = figures.shares(name)
        words = [f"products at their peak speed would take {at_peak:.0%} of its time"]
        if same is not None:
            words.append(f"{same:.0%} of it is what the model without FFN takes")
        if ends > 0.01:
            words.append(f"{ends:.0%} are begin and finish, once a step")
        lines.append(f"- {name}: {'; '.join(words)}.")
    return "What bounds each figure:\n" + "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """DOCS (default: docs)."""
    try:
        files = write_page(Path(arguments[0] if arguments else "docs"))
    except (UserError, OSError) as error:
        print(f"mlm-train: {escaped(str(error))}", file=sys.stderr)
        return 2
    print(f"docs/performance.md: from {', '.join(file.name for file in files) or 'no report yet'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
