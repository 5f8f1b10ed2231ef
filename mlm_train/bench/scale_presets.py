"""The models and layouts that `bench scale` counts, as configs of the trainer."""

from dataclasses import dataclass
from typing import Any

from mlm_train.config import Config
from mlm_train.config.load import parse_config

TOKENS = 4 * 2**20  # per step, of all ranks
SEQUENCE = 4096


@dataclass(frozen=True)
class Shape:
    """A model: sizes in elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int


SHAPES = {
    "tiny": Shape(6, 64, 4, 4, 192),  # for tests: its figures mean nothing
    "1b": Shape(24, 2048, 32, 32, 5464),
    "7b": Shape(32, 4096, 32, 32, 11008),
    "70b": Shape(80, 8192, 64, 8, 28672),
}


@dataclass(frozen=True)
class World:
    """A model in a layout. placement: of FFN-M; None for the base model, with FSDP alone."""

    shape: str
    tensor: int
    pipeline: int
    data: int
    placement: str | None

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        """A name for figures, as 70b_tp8_pp8_dp64."""
        axes = {"tp": self.tensor, "pp": self.pipeline}
        parts = [f"{axis}{size}" for axis, size in axes.items() if size > 1]
        return "_".join((self.shape, *parts, f"dp{self.data}"))

    def config(self, vocabulary: int, tokens: int = TOKENS, sequence: int = SEQUENCE) -> Config:
        """The config of a training run: bf16, one sequence per micro-batch, engine fsdp."""
        shape = SHAPES[self.shape]
        parallel: dict[str, Any] = {"engine": "fsdp", "tensor": self.tensor, "pipeline": self.pipeline}
        if self.pipeline == 1 and self.placement is not None:
            parallel["reshard_after_forward"] = False  # weights without FFN-M fit whole
        if self.tensor > 1:
            parallel["sequence"] = True
        tree: dict[str, Any] = {
            "model": {
                "kind": "base" if self.placement is None else "memory",
                "vocab_size": vocabulary,
                "hidden_size": shape.hidden,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "intermediate_size": shape.ffn,
                "max_position_embeddings": sequence,
            },
            "data": {"path": "none", "sequence_length": sequence},
            "parallel": parallel,
            "train": {
                "output": "none",
                "steps": 1,
                "device": "cpu",
                "precision": "bf16",
                "micro_batch_size": 1,
                "global_batch_size": tokens // sequence,
                "activation_checkpointing": "selective" if self.pipeline > 1 else "none",
            },
        }
        if self.placement is not None:
            tree["memory"] = {"mode": "table", "placement": self.placement}
        return parse_config(tree)


# The last two show what FSDP alone holds at rest, and gathers at once.
WORLDS = [
    *(World("1b", 1, 1, data, "owned") for data in (8, 64, 512)),
    *(World("7b", 1, 1, data, "owned") for data in (8, 64, 512)),
    *(World("70b", 8, 8, data, "owned") for data in (8, 64)),
    World("7b", 1, 1, 64, None),
    World("70b", 1, 1, 64, None),
]
