"""Config section `model`: shapes of base, memory and flex (arXiv 2602.00398, sections 2 and 3)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mlm_train.config.section import Section, reject

# Far beyond any model, and small enough that the product of two fits in 63 bits.
LARGEST = 2**24  # elements of a width
MOST_HEADS = 2**16  # also the most elements per head
MOST_LAYERS = 2**12


class ModelConfig(Section):
    """The model's architecture. Sizes count elements; derived sizes may be left out of the YAML."""

    kind: Literal["base", "memory", "flex"] = Field(
        "memory",
        description="base: a Llama. memory: x' = x + Attn(N(x)) + FFN_M(N_m(x0)). "
        "flex: memory plus a context-aware FFN_C(N_c(x)).",
    )
    vocab_size: int = Field(ge=2, le=2**31, description="number of token ids, the tokenizer's size")
    hidden_size: int = Field(ge=2, le=LARGEST, description="width of the residual stream, elements")
    num_hidden_layers: int = Field(ge=1, le=MOST_LAYERS, description="transformer layers")
    num_attention_heads: int = Field(ge=1, le=MOST_HEADS, description="query heads")
    num_key_value_heads: int | None = Field(
        None, ge=1, le=MOST_HEADS, description="key and value heads (GQA); default: as many as query heads"
    )
    head_dim: int | None = Field(
        None, ge=2, le=MOST_HEADS, description="elements per head; default: hidden_size / num_attention_heads"
    )
    intermediate_size: int = Field(
        ge=1, le=LARGEST, description="width of the FFN (base) or of FFN-M, elements"
    )
    flex_beta: float | None = Field(
        None,
        gt=0,
        lt=8,
        description="flex: beta of the paper; FFN-C gets about beta*hidden^2 parameters",
    )
    compute_intermediate_size: int | None = Field(
        None,
        ge=1,
        le=LARGEST,
        description="flex: width of FFN-C, elements; default round(beta*hidden/3), linear: beta*hidden/2",
    )
    compute_form: Literal["swiglu", "linear"] | None = Field(
        None, description="flex: FFN-C is a SwiGLU (default) or bias-free up and down projections"
    )
    compute_input: Literal["layer", "post_attention"] | None = Field(
        None, description="flex: FFN-C reads the layer's input (default) or the attention's output"
    )
    memory_scale: float | list[float] | None = Field(
        None, description="alpha, the factor on FFN-M's output: one number, or one per layer; default 1"
    )
    tie_word_embeddings: bool = Field(False, description="the output head shares the embedding's weight")
    max_position_embeddings: int = Field(2048, ge=1, le=2**31, description="longest context, tokens")
    rms_norm_eps: float = Field(1e-5, gt=0, le=1, description="epsilon inside every RMSNorm")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    @model_validator(mode="after")
    def _derive(self) -> Self:
        """Fill in derived fields; reject fields without effect and impossible shapes."""
        if self.num_key_value_heads is None:
            self._fill("num_key_value_heads", self.num_attention_heads)
        if self.num_attention_heads % self.kv_heads:
            reject(
                "model.num_key_value_heads",
                self.num_key_value_heads,
                f"must divide model.num_attention_heads={self.num_attention_heads}",
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                reject(
                    "model.num_attention_heads",
                    self.num_attention_heads,
                    f"must divide model.hidden_size={self.hidden_size}, or set model.head_dim",
                )
            self._fill("head_dim", self.hidden_size // self.num_attention_heads)
        if self.attention_head_dim % 2:
            reject("model.head_dim", self.head_dim, "must be even: rotary embedding rotates pairs")
        self._derive_flex()
        self._derive_scale()
        # Derived values obey the fields' own limits, so that a dumped config can be read back.
        for name, most in (("head_dim", MOST_HEADS), ("compute_intermediate_size", LARGEST)):
            if (getattr(self, name) or 0) > most:
                reject(
                    "model.hidden_size", self.hidden_size, f"makes {name} {getattr(self, name)}, over {most}"
                )
        return self

    def _derive_flex(self) -> None:
        names = ("flex_beta", "compute_intermediate_size", "compute_form", "compute_input")
        if self.kind != "flex":
            for name in names:
                if getattr(self, name) is not None:
                    reject(f"model.{name}", getattr(self, name), "has an effect only with model.kind=flex")
            return
        if self.compute_form is None:
            self._fill("compute_form", "swiglu")
        if self.compute_input is None:
            self._fill("compute_input", "layer")
        if self.flex_beta is None and self.compute_intermediate_size is None:
            reject("model.flex_beta", None, "set it to 1, 2 or 3 (or set model.compute_intermediate_size)")
        if self.flex_beta is not None:
            matrices = 3 if self.compute_form == "swiglu" else 2
            size = round(self.flex_beta * self.hidden_size / matrices)
            if self.compute_intermediate_size is None:
                self._fill("compute_intermediate_size", size)
            elif self.compute_intermediate_size != size:
                reject(
                    "model.compute_intermediate_size",
                    self.compute_intermediate_size,
                    f"disagrees with model.flex_beta={self.flex_beta}, which gives {size}: leave one out",
                )

    def _derive_scale(self) -> None:
        if self.kind == "base":
            if self.memory_scale is not None:
                reject("model.memory_scale", self.memory_scale, "has no effect with model.kind=base")
            return
        scale = 1.0 if self.memory_scale is None else self.memory_scale
        if not isinstance(scale, list):
            scale = [float(scale)] * self.num_hidden_layers
        if len(scale) != self.num_hidden_layers:
            reject(
                "model.memory_scale",
                scale,
                f"needs one number, or {self.num_hidden_layers} of them (model.num_hidden_layers)",
            )
        self._fill("memory_scale", scale)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, default applied."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        """Elements per head, default applied."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def has_memory(self) -> bool:
        """Whether the model has FFN-M, and thus can have a ToL."""
        return self.kind != "base"

    def alpha(self, layer: int) -> float:
        """The factor on FFN-M's output in a layer (1 in the paper's training)."""
        assert isinstance(self.memory_scale, list)
        return self.memory_scale[layer]
