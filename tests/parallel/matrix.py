"""The parity matrix: the layouts and cases that are compared with one process.

The cases are a product of the axes that concern x0, and all pairs of choices of all axes (pairwise.py). Not
every combination, but each layout has every kind, transport, schedule, mode, tied and untied heads, uneven
stages, dimensions that the ranks do not divide, and micro-batch counts that the pipeline does not divide.
"""

from itertools import cycle

from tests.parallel.layouts import LAYOUTS as ALL_LAYOUTS
from tests.parallel.layouts import MODELS, Case, Layout, shaped
from tests.parallel.pairwise import pairwise

# Layouts with cases of the all-pairs design only.
PAIRS_ONLY = (Layout(1, 1, 4), Layout(2, 2, 1, virtual=2), Layout(1, 2, 2, virtual=2))
PRODUCT = [layout for layout in ALL_LAYOUTS if layout not in PAIRS_ONLY]
LAYOUTS = [*PRODUCT, *PAIRS_ONLY]


def cases_of(layout: Layout) -> dict[str, Case]:
    """Name -> case, for tests/parallel/parity_cases.py."""
    product = _flat_cases(layout) if layout.pipeline == 1 else _pipeline_cases(layout)
    return (product if layout in PRODUCT else {}) | pairwise().get(layout, {})


def pairs_of_choices(layout: Layout) -> dict[str, Case]:
    """Those that hold every pair of choices; a layout that has none there brings all of its own.

    Without a pipeline these are each model in each mode, by turns with and without odd sizes.
    """
    cases = pairwise().get(layout) or cases_of(layout)
    if layout in pairwise() or layout.pipeline > 1:
        return cases
    return {name: case for number, (name, case) in enumerate(cases.items()) if number % 4 in (0, 3)}


def further(layout: Layout) -> dict[str, Case]:
    """All others: the product of the axes that concern x0, where the layout is in the all-pairs design."""
    pairs = pairs_of_choices(layout)
    return {name: case for name, case in cases_of(layout).items() if name not in pairs}


def _modes(model: Case) -> tuple[str | None, ...]:
    return (None,) if model["kind"] == "base" else ("per_token", "unique", "table")


def _flat_cases(layout: Layout) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    parallel = {"tensor": layout.tensor}
    sizes = cycle([size for size in (1, 4, 2) if size * layout.data <= 8])  # of eight sequences
    for name, model in MODELS.items():
        for mode in _modes(model):
            for odd in (False, True) if layout.tensor > 1 else (False,):
                micro_batch = next(sizes)
                title = f"{name}{', odd sizes' if odd else ''} / {mode} / micro-batch {micro_batch}"
                cases[title] = {
                    "model": shaped(model, layout, odd, 3),
                    "mode": mode,
                    "micro_batch": micro_batch,
                    "parallel": parallel,
                }
    cases["embeddings not decayed"] = cases[next(iter(cases))] | {
        "optimizer": {"lr": 1e-2, "max_grad_norm": 0.5, "decay_embeddings": False}
    }
    return cases


def _micro_batches(layout: Layout) -> tuple[int, ...]:
    """Micro-batches per step: numbers that the pipeline size divides and numbers that it does not."""
    if layout.data > 1 or layout.virtual > 1:
        return (4, 3)
    return (4, 5, 6) if layout.pipeline == 4 else (4, 3, 5)


def _pipeline_cases(layout: Layout) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    schedules = ("interleaved_1f1b",) if layout.virtual > 1 else ("1f1b", "gpipe")
    stages = layout.pipeline * layout.virtual
    counts = cycle(_micro_batches(layout))
    for name, model in MODELS.items():
        has_memory = model["kind"] != "base"
        for transport in ("broadcast", "relay", "replicate") if has_memory else (None,):
            for mode, schedule in zip(_modes(model), cycle(schedules), strict=False):
                if mode == "table" and transport != "broadcast":
                    continue
                layers, count = stages + 1, next(counts)
                parallel: Case = {
                    "tensor": layout.tensor,
                    "pipeline": layout.pipeline,
                    "pipeline_schedule": schedule,
                }
                if transport:
                    parallel["x0_transport"] = transport
                if layout.virtual > 1:
                    parallel["virtual_stages"] = layout.virtual
                if mode == "unique":
                    parallel["layers_per_stage"] = [1] * (stages - 2) + [2, 1]
                title = f"{name} / {transport} / {schedule} / {mode} / {count} micro-batches"
                cases[title] = {
                    "model": shaped(model, layout, layout.tensor > 1, layers),
                    "mode": mode,
                    "micro_batch": 1,
                    "parallel": parallel,
                    "train": {"global_batch_size": count * layout.data},
                }
    return cases
