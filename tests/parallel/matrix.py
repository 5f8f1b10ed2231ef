"""The parity matrix: which layouts and cases are compared with one process.

A product of the axes that concern x0, and all pairs of all axes (pairwise.py).
Not every combination: each layout meets every kind, transport, schedule, mode, tied and untied heads,
uneven stages, dimensions that nothing divides, and micro-batch counts that the pipeline does not divide.
"""

from itertools import cycle

from tests.parallel.layouts import LAYOUTS as EVERY
from tests.parallel.layouts import MODELS, Case, Layout, shaped
from tests.parallel.pairwise import pairwise

# Layouts whose cases are the all-pairs design's alone.
PAIRS_ONLY = (Layout(1, 1, 4), Layout(2, 2, 1, virtual=2), Layout(1, 2, 2, virtual=2))
PRODUCT = [layout for layout in EVERY if layout not in PAIRS_ONLY]
LAYOUTS = [*PRODUCT, *PAIRS_ONLY]


def cases_of(layout: Layout) -> dict[str, Case]:
    """Name -> case, for tests/parallel/parity_cases.py."""
    product = _flat_cases(layout) if layout.pipeline == 1 else _pipeline_cases(layout)
    return (product if layout in PRODUCT else {}) | pairwise().get(layout, {})


def _modes(model: Case) -> tuple[str | None, ...]:
    return (None,) if model["kind"] == "base" else ("per_token", "unique", "table")


def _flat_cases(layout: Layout) -> dict[str, Case]:
    found: dict[str, Case] = {}
    parallel = {"tensor": layout.tensor}
    sizes = cycle([size for size in (1, 4, 2) if size * layout.data <= 8])  # of eight sequences
    for name, model in MODELS.items():
        for mode in _modes(model):
            for odd in (False, True) if layout.tensor > 1 else (False,):
                micro_batch = next(sizes)
                title = f"{name}{', odd sizes' if odd else ''} / {mode} / micro-batch {micro_batch}"
                found[title] = {
                    "model": shaped(model, layout, odd, 3),
                    "mode": mode,
                    "micro_batch": micro_batch,
                    "parallel": parallel,
                }
    found["embeddings not decayed"] = found[next(iter(found))] | {
        "optimizer": {"lr": 1e-2, "max_grad_norm": 0.5, "decay_embeddings": False}
    }
    return found


def _micro_batches(layout: Layout) -> tuple[int, ...]:
    """Micro-batches a step: some that the pipeline's size divides, some that it does not."""
    if layout.data > 1 or layout.virtual > 1:
        return (4, 3)
    return (4, 5, 6) if layout.pipeline == 4 else (4, 3, 5)


def _pipeline_cases(layout: Layout) -> dict[str, Case]:
    found: dict[str, Case] = {}
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
                found[title] = {
                    "model": shaped(model, layout, layout.tensor > 1, layers),
                    "mode": mode,
                    "micro_batch": 1,
                    "parallel": parallel,
                    "train": {"global_batch_size": count * layout.data},
                }
    return found
