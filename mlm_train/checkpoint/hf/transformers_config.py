"""The config of a MemoryLLM for transformers: the fields of an export's config.json."""

from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from mlm_train.checkpoint.hf.config import model_config
from mlm_train.config import ModelConfig

FFN_M = ("memory_layernorm", "memory_mlp")  # modules of a layer, and of their weights' names


class MemoryLLMConfig(PreTrainedConfig):
    """Config of kinds memory and flex; `base` is a Llama for transformers. Sizes count elements.

    The fields are those of `ModelConfig` (mlm_train/config/model.py) under Llama's names, and all of them are
    saved, so that mlm-train reads what save_pretrained writes.
    """

    model_type = "memoryllm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers declares it
    # There is no base_model_pp_plan: later stages would need x0 too, which transformers does not send.
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.memory_mlp.gate_proj": "colwise",
        "layers.*.memory_mlp.up_proj": "colwise",
        "layers.*.memory_mlp.down_proj": "rowwise",
        "layers.*.compute_mlp.gate_proj": "colwise",
        "layers.*.compute_mlp.up_proj": "colwise",
        "layers.*.compute_mlp.down_proj": "rowwise",
    }

    kind: Literal["memory", "flex"] = "memory"
    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    memory_scale: list[int | float] | None = None
    compute_intermediate_size: int | None = None
    compute_form: Literal["swiglu", "linear"] | None = None
    compute_input: Literal["layer", "post_attention"] | None = None
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    add_bos_token: bool | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what other fields imply."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.memory_scale is None:
            self.memory_scale = [1.0] * self.num_hidden_layers
        if self.kind == "flex":
            self.compute_form = self.compute_form or "swiglu"
            self.compute_input = self.compute_input or "layer"
        super().__post_init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The same model for mlm_train. UserError for what it cannot express, as scaled rotary angles."""
        return model_config(self.to_dict(), Path(self.name_or_path or "") / "config.json")
