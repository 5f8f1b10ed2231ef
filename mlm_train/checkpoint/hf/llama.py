"""config.json of a Hugging Face Llama, read as transformers 5 reads it, with its defaults and precedence.

A field that this model cannot express is rejected by name; fields without effect on a Llama are ignored.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlm_train.errors import UserError
from mlm_train.utils.records import record_of

CORRECT = "add or correct it, or export the model again"
ROPE_THETA = 10000.0  # default of a Llama's config.json
# Field -> the supported JSON values, and why no others.
_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "it must be silu"),
    "attention_bias": ((False,), "the model has no biases"),
    "mlp_bias": ((False,), "the model has no biases"),
    "is_causal": ((True, None), "attention is causal"),
    "sliding_window": ((None,), "attention spans the whole context"),
    "attention_chunk_size": ((None,), "attention spans the whole context"),
    "kv_sharing_modes": ((None,), "each layer has its own keys and values"),
    "per_layer_config": ((None,), "all layers are alike"),
    "text_config": ((None,), "give the folder of the language model only"),
    "transformers_weights": ((None,), "weights are read from model.safetensors or its index"),
    "quantization_config": ((None,), "give weights in float32, bfloat16 or float16, not quantized ones"),
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "memoryllm": "MemoryLLMForCausalLM"}


class LlamaJson(BaseModel):
    """The fields with an effect, strictly typed, with transformers' defaults."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = Field(0.02, gt=0, le=1)
    attention_dropout: float | None = 0.0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None


def read_llama(tree: dict[str, Any], file: Path) -> LlamaJson:
    """The fields of config.json. UserError naming a field of a wrong type, or an unsupported dtype."""
    if tree.get("dtype") is None and "torch_dtype" in tree:  # the name in transformers 4
        return record_of(LlamaJson, tree | {"dtype": tree["torch_dtype"]}, file, f"{CORRECT} (torch_dtype)")
    return record_of(LlamaJson, tree, file, CORRECT)


def check_expressible(tree: dict[str, Any], file: Path) -> None:
    """Raise UserError naming the first field whose value this model cannot express."""
    for name, (supported, reason) in _ONLY.items():
        if name in tree and tree[name] not in supported:
            raise UserError(f"{file}: {name}={_short(tree[name])} is not supported; {reason}")
    layers = tree.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}):
        raise UserError(f"{file}: layer_types={_short(layers)} is not supported; all are full_attention here")
    expected = ARCHITECTURES[tree["model_type"]]
    given = tree.get("architectures")
    if given is not None and (not isinstance(given, list) or any(name != expected for name in given)):
        raise UserError(f"{file}: architectures={_short(given)} is not supported; give a {expected}")


def rope_theta(tree: dict[str, Any], file: Path, default: float | None) -> float:
    """The rotary base: of rope_scaling, else of rope_parameters, else rope_theta, else `default`.

    An empty rope_scaling is ignored. Raises UserError for scaled rotary embeddings, and for a base that
    depends on the layer type.
    """
    name = "rope_scaling" if tree.get("rope_scaling") else "rope_parameters"
    rope = tree.get(name)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        raise UserError(f"{file}: {name}={_short(rope)} is not supported; it must be an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"{file}: {name}: rope_type={_short(rope_type)} is not supported; it must be default")
    if nested := [kind for kind in tree.get("layer_types") or () if kind in rope]:
        raise UserError(f"{file}: {name} has a base per layer type ({nested[0]}); give one for all")
    where, theta = name, rope.get("rope_theta")
    if "rope_theta" not in rope:
        where, theta = "rope_theta", tree.get("rope_theta", default)
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        missing = theta is None and "rope_theta" not in tree and "rope_theta" not in rope
        what = "is missing" if missing else f"is {_short(theta)}"
        raise UserError(f"{file}: {name}: {where} {what}; give a number (a Llama 2 has 10000.0)")
    return float(theta)


def _short(value: Any) -> str:
    return json.dumps(value)[:80]
