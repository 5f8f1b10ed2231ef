"""The plan of a ToL as one page of text."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlm_train.errors import escaped
from mlm_train.plan.tol import LARGEST_BATCH
from mlm_train.utils.units import in_units

WIDTH = 110
ALWAYS = [(1, None)]  # all batch sizes
FORMULAE = """Formulae (GB = 1e9 bytes; rows = max(1, batch x --distinct))
  row bytes     layers x hidden x 16, 8.25 or 4.25 bits (int8, int4: a float16 scale for each group of 64);
                low rank: r values per layer, and once a basis of r x hidden float16 in VRAM;
                a layer of int8, int4 or low rank is padded to a multiple of 16 bytes
  table         vocabulary x row bytes + bases
  build         vocabulary x 6 x layers x hidden x intermediate FLOPs / speed, then bytes / --write-gbs
  FFN-M's step  longer of: weights' bytes / bandwidth of their tier; rows x FLOPs / --tflops
  ToL's step    longer of: rows x row bytes / bandwidth (NVMe: whole blocks of 4096 bytes);
                NVMe: max(1, rows / --nvme-reads) x --nvme-latency-us;
                low rank adds the longer of: bases / --vram-gbs; rows x 2 x layers x r x hidden / --tflops
Left out: decoding of codes, caches, prefetching, copies that overlap other work, the KV cache."""


def print_page(plan: dict[str, Any]) -> None:
    """Print tables, verdicts, formulae and assumptions."""
    console = Console(width=WIDTH, highlight=False, soft_wrap=True)
    console.print(_sizes(plan), soft_wrap=False)
    console.print(_steps(plan), soft_wrap=False)
    for line in (*_verdicts(plan), "", FORMULAE, "", *_assumed(plan)):
        console.print(line, markup=False)


def _sizes(plan: dict[str, Any]) -> Table:
    columns = ("stored as", "bytes per row", "size", "times FFN-M's weights", "compute", "write")
    table = _table(f"ToL of {plan['model']}", columns)
    weights = plan["ffn_m"]["bytes"]
    table.add_row(f"FFN-M's weights ({plan['assumed']['weights-dtype']})", "", in_units(weights), "1", "", "")
    for entry in plan["tables"]:
        size, times = in_units(entry["bytes"]), _number(entry["bytes"] / weights)
        seconds = (_time(entry["compute_seconds"]), _time(entry["write_seconds"]))
        table.add_row(entry["stored"], f"{entry['row_bytes']:,}", size, times, *seconds)
    return table


def _steps(plan: dict[str, Any]) -> Table:
    """Times per decode step, with a star where the ToL is faster."""
    columns = ["read from", *(f"batch {batch}" for batch in plan["batch"]), "pays at"]
    table = _table("FFN-M's time per decode step (* faster than the first line)", columns)
    own = plan["ffn_m"]
    own_cells = (f"{_time(value)} " for value in own["seconds"])
    table.add_row(f"FFN-M's weights in {own['tier']}, computed", *own_cells, "")
    for offer in plan["serving"]:
        name = f"{offer['stored']} ToL in {offer['tier']}"
        if not offer["fits"]:
            table.add_row(name, *("-" for _ in plan["batch"]), "does not fit")
            continue
        cells = [
            _time(value) + ("*" if value < other else " ")
            for value, other in zip(offer["seconds"], own["seconds"], strict=True)
        ]
        table.add_row(name, *cells, _when(offer["pays"]))
    return table


def _table(title: str, columns: tuple[str, ...] | list[str]) -> Table:
    """A table with names aligned left and numbers right."""
    table = Table(title=Text(escaped(title), "italic"), box=box.SIMPLE, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 0 else "left")
    return table


def _when(pays: list[tuple[int, int | None]]) -> str:
    """Batch sizes as text."""
    if not pays:
        return "no batch"
    if pays == ALWAYS:
        return "any batch"
    return ", ".join(f"batch {a} and up" if b is None else f"batch {a} to {b - 1}" for a, b in pays)


def _verdicts(plan: dict[str, Any]) -> list[str]:
    """Lines on where a ToL does not pay in time, where it pays in bytes, and how much it can save."""
    own, others, batch = plan["ffn_m"], plan["other_weights"], plan["batch"][0]
    limited = [offer for offer in plan["serving"] if offer["pays"] != ALWAYS]
    verdicts = [f"  {offer['stored']} ToL in {offer['tier']}: {_verdict(offer)}" for offer in limited]
    smaller = [table["stored"] for table in plan["tables"] if table["bytes"] < own["bytes"]]
    saved = own["seconds"][0] / (own["seconds"][0] + others["seconds"])
    return [
        f"In time, a ToL does not pay against FFN-M's weights in {own['tier']} (batch 1 to {LARGEST_BATCH}):",
        *(verdicts or ["  nowhere: it pays in every tier at every batch size"]),
        f"In bytes, a ToL pays as: {'; '.join(smaller) or 'none of these, all are larger than the weights'}.",
        f"A step reads {in_units(others['bytes_a_step'])} of other weights either way, "
        f"{_time(others['seconds'])}: a ToL saves at most {saved:.0%} at batch {batch}.",
    ]


def _verdict(offer: dict[str, Any]) -> str:
    if not offer["fits"]:
        return f"it does not fit ({in_units(offer['bytes'])})"
    pays = offer["pays"]
    if not pays:
        return "at no batch size"
    stop = pays[-1][1]
    return f"it pays only at {_when(pays)}" + ("" if stop is None else f", not at batch {stop} and up")


def _assumed(plan: dict[str, Any]) -> list[str]:
    """A line for every assumption, with its option."""
    from mlm_train.plan.assumptions import ASSUMPTIONS

    build = plan["build_tflops"]
    source = "measured on this machine's CPU, fp32, all threads" if build["measured"] else "as given"
    lines = [
        f"--build-tflops {build['value']:.3g}: {source}",
        "Assumed, not measured (change them by option):",
    ]
    figures = plan["assumed"]
    lines += [f"  --{item.option} {figures[item.option]:g}: {item.meaning}" for item in ASSUMPTIONS]
    return [*lines, f"  --weights-dtype {figures['weights-dtype']}: of all weights"]


def _time(seconds: float) -> str:
    """Seconds in the largest unit that leaves one or more."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{_number(seconds * factor)} {unit}"
    return f"{_number(seconds * 1e9)} ns"


def _number(value: float) -> str:
    """A number with three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.6f}"
