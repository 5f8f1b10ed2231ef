"""The shapes and variants that `bench train` measures, as configs of the trainer."""

from dataclasses import dataclass
from typing import Any, Literal

from mlm_train.bench.built import MODES, SEED
from mlm_train.config import Config
from mlm_train.config.load import parse_config
from mlm_train.errors import UserError
from mlm_train.model.counts import train_flops_per_token

HF = ("hf.eager", "hf.compiled")
COMPILED = ".compiled"  # suffix of our variants with config field train.compile
SHARED = ("base", "flex3.table", "memory.table", "noffn", *HF)
ALL = ("base", "noffn", "flex1.table", "flex2.table", "flex3.table", *(f"memory.{m}" for m in MODES), *HF)


@dataclass(frozen=True)
class Preset:
    """A shape: sizes in elements, lengths and steps in tokens, micro_batch in sequences."""

    name: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    sequence: int
    micro_batch: int
    tokens: int  # per step
    steps_of: tuple[int, ...]  # tokens per step for the ratio by step size
    variants: tuple[str, ...]
    validated: tuple[str, ...]  # variants whose whole step is timed too

    @property
    def micro_tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.micro_batch * self.sequence


_SIZES = (4096, 16384, 65536)
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("a", 12, 768, 12, 2048, 32768, 1024, 2, 16384, _SIZES, ALL, ("base", "memory.table")),
        Preset("b", 8, 1024, 16, 2736, 32768, 1024, 2, 65536, _SIZES, SHARED, ("memory.table",)),
        # For a GPU: the paper's 1B shape and vocabulary (configs/paper/base-1b.yaml), long sequences.
        Preset("1b", 24, 2048, 32, 5464, 128256, 8192, 1, 65536, (65536, 262144), SHARED, ("memory.table",)),
        # For tests: takes seconds, and its figures mean nothing.
        Preset("tiny", 2, 48, 4, 128, 512, 32, 2, 256, (128, 256, 512), ALL, ("base", "memory.table")),
    )
}


@dataclass(frozen=True)
class Variant:
    """A variant of training: a model kind, an execution of FFN-M, compiled or not."""

    name: str
    family: Literal["hf", "base", "noffn", "memory", "flex"]
    mode: str | None  # of MODES
    beta: int | None
    compiled: bool

    @classmethod
    def named(cls, name: str) -> "Variant":
        """The variant of a name. UserError for an unknown name."""
        plain, compiled = name.removesuffix(COMPILED), name.endswith(COMPILED)
        if plain not in (*ALL, *(f"flex{beta}.{mode}" for beta in (1, 2, 3) for mode in MODES), "hf"):
            raise UserError(f"variant {name!r} is unknown; choose from {', '.join(ALL)}")
        if plain.startswith("hf"):
            if name not in HF:
                raise UserError(f"variant {name!r} is unknown; transformers' variants are {', '.join(HF)}")
            return cls(name, "hf", None, None, compiled)
        kind, _, mode = plain.partition(".")
        if kind.startswith("flex"):
            return cls(name, "flex", mode, int(kind.removeprefix("flex")), compiled)
        family: Literal["base", "noffn", "memory"] = (
            "base" if kind == "base" else "noffn" if kind == "noffn" else "memory"
        )
        return cls(name, family, mode or None, None, compiled)

    @property
    def peers(self) -> str:
        """Group of variants with the same function and weights, whose losses must agree."""
        return "base" if self.family == "hf" else f"{self.family}{self.beta or ''}"


def make_config(
    preset: Preset, variant: Variant, data: str, precision: str, tokens: int, device: str = "cpu"
) -> Config:
    """The config of a training run with `tokens` per step; base for transformers' variants.

    All except noffn have the same number of parameters: memory's FFN-M is as large as base's FFN, flex's is
    smaller by FFN-C's beta*hidden/3 keys, as in the paper (flex has hidden more per layer, for FFN-C's norm).
    noffn is base here; the worker removes its FFN.
    """
    kind = variant.family if variant.family in ("memory", "flex") else "base"
    model: dict[str, Any] = {
        "kind": kind,
        "vocab_size": preset.vocabulary,
        "hidden_size": preset.hidden,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "intermediate_size": preset.ffn,
        "max_position_embeddings": preset.sequence,
    }
    if variant.beta is not None:
        model["flex_beta"] = variant.beta
        model["intermediate_size"] -= round(variant.beta * preset.hidden / 3)
    train: dict[str, Any] = {
        "output": "none",
        "steps": 1,
        "micro_batch_size": preset.micro_batch,
        "global_batch_size": tokens // preset.sequence,
        "precision": precision,
        "seed": SEED,
        "device": device,
        "compile": variant.compiled and variant.family != "hf",
    }
    tree: dict[str, Any] = {
        "model": model,
        "data": {"path": data, "sequence_length": preset.sequence},
        # Nothing to shard in one process: plain gradients, as in transformers. FSDP needs torch alone.
        "parallel": {"zero_stage": 0} if device == "cpu" else {"engine": "fsdp"},
        "train": train,
    }
    if variant.mode is not None:
        tree["memory"] = MODES[variant.mode]
    return parse_config(tree)


def flops_per_token(
    variant: Variant, config: Config, distinct: dict[str, float], recomputed: bool = True
) -> float:
    """FLOPs per token of forward and backward, by the formula of model/counts.py.

    `distinct`: distinct ids / tokens of the step ("step") and of its micro-batches ("micro"). A table's
    backward pass recomputes FFN-M's forward unless it was kept: 4/3 of FFN-M, unless `recomputed` is False.
    """
    if variant.mode in ("table", "kept"):
        ratio = distinct["step"] * (4 / 3 if recomputed and variant.mode == "table" else 1.0)
    else:
        ratio = distinct["micro"] if variant.mode == "unique" else 1.0
    if variant.family == "noffn":  # memory without FFN-M has the same matrix multiplications
        memory = config.model.model_copy(update={"kind": "memory"})
        return train_flops_per_token(memory, config.data.sequence_length, 0.0)
    return train_flops_per_token(config.model, config.data.sequence_length, ratio)
