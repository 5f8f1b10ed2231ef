"""config.json of an export: our ModelConfig as Hugging Face fields, and back."""

from pathlib import Path
from typing import Any

from mlm_train.checkpoint.hf.files import ADD_BOS, NO_TOKENS, SpecialTokens, special_tokens
from mlm_train.checkpoint.hf.llama import (
    ARCHITECTURES,
    CORRECT,
    ROPE_THETA,
    check_expressible,
    read_llama,
    rope_theta,
)
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.utils.records import read_json, record_of

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)
FLEX = ("compute_intermediate_size", "compute_form", "compute_input")


def config_json(
    config: ModelConfig, dtype: str = "float32", tokens: SpecialTokens = NO_TOKENS
) -> dict[str, Any]:
    """The contents of config.json; `base` is a Llama for transformers.

    rope_theta is at the top level for transformers 4 and in rope_parameters for transformers 5, and likewise
    the dtype as torch_dtype and dtype.
    """
    model_type = "memoryllm" if config.has_memory else "llama"
    tree: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "kind": config.kind,
        **{name: getattr(config, name) for name in SHARED},
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "compute_intermediate_size": config.compute_intermediate_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        **tokens.tree(),
        **({} if tokens.add_bos is None else {ADD_BOS: tokens.add_bos}),
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.has_memory:
        tree["memory_scale"] = config.memory_scale
    if config.kind == "flex":
        tree |= {name: getattr(config, name) for name in FLEX}
    return tree


def read_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of an export folder; a plain Hugging Face Llama is kind base.

    Raises UserError for a missing or broken config.json, and for a Llama that this model cannot express.
    """
    file = Path(path) / "config.json"
    config = model_config(read_json(file, "give a folder written by `mlm-train export`, or a Llama's"), file)
    special_tokens(file.parent)
    return config


def model_config(tree: dict[str, Any], file: Path) -> ModelConfig:
    """The ModelConfig of a config.json's contents; `file` is named in errors. Raises UserError."""
    kind = _kind(tree, file)
    check_expressible(tree, file)
    llama = read_llama(tree, file)
    fields: dict[str, Any] = {"kind": kind, "init_std": llama.initializer_range}
    fields |= {name: getattr(llama, name) for name in SHARED}
    # transformers' defaults apply to a Llama only.
    ours = () if kind == "base" else (*SHARED, "memory_scale", *FLEX * (kind == "flex"))
    for name in ours:
        if tree.get(name) is None:
            raise UserError(f"{file}: {name} is missing; add it, or export the model again")
        fields[name] = tree[name]
    fields["rope_theta"] = rope_theta(tree, file, ROPE_THETA if kind == "base" else None)
    return record_of(ModelConfig, fields, file, CORRECT)


def _kind(tree: dict[str, Any], file: Path) -> str:
    model_type, kind = tree.get("model_type"), tree.get("kind", "base")
    if model_type not in ("llama", "memoryllm"):
        raise UserError(f"{file}: model_type={model_type!r} is not supported; it must be llama or memoryllm")
    if kind not in (("base",) if model_type == "llama" else ("memory", "flex")):
        raise UserError(f"{file}: kind={kind!r} does not go with model_type={model_type!r}; export again")
    return kind
