"""Parts of the parity cases: models, memory modes, layouts."""

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
# How FFN-M is executed: config section memory.
MODES: dict[str, Case] = {
    "per_token": {"mode": "per_token"},
    "unique": {"mode": "unique"},
    "table": {"mode": "table"},
    "table shared": {"mode": "table", "placement": "shared"},
    "table owned": {"mode": "table", "placement": "owned"},
    "table of a layer owned": {"mode": "table", "table_layers": 1, "placement": "owned"},
    "table kept": {"mode": "table", "kept_layers": 1},
    "table of a layer": {"mode": "table", "table_layers": 1},
    "table of a layer shared": {"mode": "table", "table_layers": 1, "placement": "shared"},
}
BF16_MODES = {"table owned, bf16 gradient rows": MODES["table owned"] | {"gradient_rows": "bf16"}}
# Sizes that neither 2 nor 4 divides, which pads vocabulary, FFN, FFN-C and FFN-M.
ODD = {"vocab_size": 97, "intermediate_size": 45}


class Layout(NamedTuple):
    """Sizes of the parallel axes."""

    tensor: int
    pipeline: int
    data: int
    virtual: int = 1

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = {"TP": self.tensor, "PP": self.pipeline, "V": self.virtual, "DP": self.data}
        return " ".join(f"{axis}{size}" for axis, size in parts.items() if size > 1) or "one process"


def shaped(model: Case, layout: Layout, odd: bool, layers: int) -> Case:
    """A model that fits the layout's tensor parallelism; `odd`: with sizes that it does not divide."""
    model = model | {"num_hidden_layers": layers}
    if layout.tensor > model.get("num_key_value_heads", 4):
        model.pop("num_key_value_heads")
    if odd:
        model = model | ODD
        if model["kind"] == "flex":
            model.pop("flex_beta")
            model["compute_intermediate_size"] = 21
    return model


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
    Layout(2, 2, 1, virtual=2),
    Layout(1, 2, 2),
    Layout(1, 2, 2, virtual=2),
    Layout(2, 2, 2),
]
