"""The parity matrix: which layouts and cases are compared with one process.

Not every combination: each layout meets every kind, transport, schedule, mode, tied and untied heads,
uneven stages, dimensions that nothing divides, and micro-batch counts that the pipeline does not divide.
"""

from itertools import cycle
from typing import Any, NamedTuple

Case = dict[str, Any]

MODELS: dict[str, Case] = {
    "base": {"kind": "base"},
    "base gqa tied": {"kind": "base", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "memory": {"kind": "memory"},
    "memory tied alpha": {"kind": "memory", "tie_word_embeddings": True, "memory_scale": 0.5},
    "flex": {"kind": "flex", "flex_beta": 2, "num_key_value_heads": 2},
    "flex linear post tied": {
        "kind": "flex",
        "flex_beta": 2,
        "compute_form": "linear",
        "compute_input": "post_attention",
        "tie_word_embeddings": True,
    },
}
# Sizes that neither 2 nor 4 divides: padding of vocabulary, FFN, FFN-C and FFN-M.
ODD = {"vocab_size": 97, "intermediate_size": 45}


class Layout(NamedTuple):
    """How many processes, and what they share."""

    tensor: int
    pipeline: int
    data: int
    virtual: int = 1

    @property
    def world(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = {"TP": self.tensor, "PP": self.pipeline, "V": self.virtual, "DP": self.data}
        return " ".join(f"{axis}{size}" for axis, size in parts.items() if size > 1) or "one process"


LAYOUTS = [
    Layout(1, 1, 1),
    Layout(1, 1, 2),
    Layout(1, 1, 4),
    Layout(2, 1, 1),
    Layout(1, 2, 1),
    Layout(1, 2, 1, virtual=2),
    Layout(4, 1, 1),
    Layout(1, 4, 1),
    Layout(2, 1, 2),
    Layout(2, 2, 1),
    Layout(1, 2, 2),
    Layout(2, 2, 2),
]


def cases_of(layout: Layout) -> dict[str, Case]:
    """Name -> case, for tests/parallel/parity_cases.py."""
    found = _flat_cases(layout) if layout.pipeline == 1 else _pipeline_cases(layout)
    return found | _zero_cases(layout, found)


def _zero_cases(layout: Layout, found: dict[str, Case]) -> dict[str, Case]:
    """Some of a layout's cases again under every other ZeRO stage, tied and untied heads by turns."""
    stages = (0, 2, 3) if layout.pipeline == 1 else (0, 2)
    several = 2 if layout.pipeline == 1 else 3
    by_head = {tied: [name for name in found if (" tied" in name) == tied] for tied in (False, True)}
    chosen: dict[str, Case] = {}
    for i, stage in enumerate(stages):
        for j in range(several):
            names = by_head[(i + j) % 2 == 0]
            name = names[(5 * i + 3 * j) % len(names)]
            case = found[name] | {"parallel": found[name]["parallel"] | {"zero": stage}}
            if stage == 3:  # cuts each tensor, whatever the layout
                case["model"] = case["model"] | ODD
            chosen[f"{name} / ZeRO-{stage}"] = case
    return chosen


def _model(model: Case, layout: Layout, odd: bool, layers: int) -> Case:
    """A model of the layout: odd sizes under tensor parallelism, heads that it divides."""
    model = model | {"num_hidden_layers": layers}
    if layout.tensor > model.get("num_key_value_heads", 4):
        model.pop("num_key_value_heads")
    if odd:
        model = model | ODD
        if model["kind"] == "flex":
            model.pop("flex_beta")
            model["compute_intermediate_size"] = 21
    return model


def _modes(model: Case) -> tuple[str | None, ...]:
    return (None,) if model["kind"] == "base" else ("per_token", "unique")


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
                    "model": _model(model, layout, odd, 3),
                    "mode": mode,
                    "micro_batch": micro_batch,
                    "parallel": parallel,
                }
    found["embeddings not decayed"] = found[next(iter(found))] | {
        "optimizer": {"lr": 1e-2, "clip": 0.5, "decay_embeddings": False}
    }
    return found


def _micro_batches(layout: Layout) -> tuple[int, ...]:
    """Micro-batches a step: some that the pipeline's size divides, some that it does not.

    Sizes are chosen so that one fp32 process stays within the limits of the float64 reference: with five
    sequences in PP2's order of cases, AdamW alone carries it 1.6e-4 away, whatever the layout.
    """
    if layout.virtual > 1:
        return (8, 3)
    if layout.data > 1:
        return (4, 3)
    return (8, 7, 9) if (layout.tensor, layout.pipeline) == (1, 2) else (8, 7, 5)


def _pipeline_cases(layout: Layout) -> dict[str, Case]:
    found: dict[str, Case] = {}
    schedules = ("interleaved_1f1b",) if layout.virtual > 1 else ("1f1b", "gpipe")
    stages = layout.pipeline * layout.virtual
    counts = cycle(_micro_batches(layout))
    for name, model in MODELS.items():
        has_memory = model["kind"] != "base"
        for transport in ("broadcast", "relay", "replicate") if has_memory else (None,):
            for mode, schedule in zip(_modes(model), cycle(schedules), strict=False):
                layers, count = stages + 1, next(counts)
                parallel: Case = {"tensor": layout.tensor, "pipeline": layout.pipeline, "schedule": schedule}
                if transport:
                    parallel["x0_transport"] = transport
                if layout.virtual > 1:
                    parallel["virtual_stages"] = layout.virtual
                if mode == "unique":
                    parallel["layers_per_stage"] = [1] * (stages - 2) + [2, 1]
                title = f"{name} / {transport} / {schedule} / {mode} / {count} micro-batches"
                found[title] = {
                    "model": _model(model, layout, layout.tensor > 1, layers),
                    "mode": mode,
                    "micro_batch": 1,
                    "parallel": parallel,
                    "train": {"global_batch": count * layout.data},
                }
    return found
