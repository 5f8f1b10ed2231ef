"""MemoryLLM for transformers: weights under an export's names, FFN-M computed or looked up in a ToL."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mlm_train.checkpoint.hf.transformers_config import FFN_M, MemoryLLMConfig
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.feedforward import LinearFFN
from mlm_train.model.rope import rotary_angles, rotate
from mlm_train.model.source import MemoryReader
from mlm_train.tol.serve.source import TolSource


def open_table(folder: str | Path, config: MemoryLLMConfig) -> TolSource:
    """Open a ToL's folder for the model of a config; see TolSource.of_export."""
    return TolSource.of_export(folder, config.name_or_path or "", config.model_config())


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with the weights that an export has: gate and up are not fused."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class TableEmbedding(nn.Module):
    """The embeddings of a ToL that has them, in place of a weight."""

    def __init__(self, table: TolSource) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, sequence] -> x0 fp32 [batch, sequence, hidden]."""
        return self.table.open_with_x0(ids, torch.float32)[0]


class MemoryLLMAttention(nn.Module):
    """Causal attention by any of transformers' implementations, which read the attributes set here."""

    is_causal = True

    def __init__(self, config: MemoryLLMConfig, shape: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer, shape.attention_head_dim
        self.num_key_value_groups = shape.num_attention_heads // shape.kv_heads
        self.scaling = self.head_dim**-0.5
        width, kv_width = shape.num_attention_heads * self.head_dim, shape.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x [batch, sequence, hidden] -> the same shape, and the attention's weights where they are made.

        angles: cos and sin of rotary_angles, [batch, 1, sequence, head_dim].
        """
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = angles
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.flatten(2)), weights


class MemoryLLMDecoderLayer(GradientCheckpointingLayer):
    """x' = x + Attn(N(x)) [+ FFN_C(N_c(x))] + alpha * FFN_M(N_m(x0))."""

    def __init__(self, config: MemoryLLMConfig, shape: ModelConfig, layer: int, with_memory: bool) -> None:
        super().__init__()
        hidden, eps = shape.hidden_size, shape.rms_norm_eps
        self.layer_idx, self.alpha = layer, shape.alpha(layer)
        self.after_attention = shape.compute_input == "post_attention"
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = MemoryLLMAttention(config, shape, layer)
        self.compute_mlp: nn.Module | None = None
        if shape.compute_intermediate_size is not None:  # flex
            form = SwiGLU if shape.compute_form == "swiglu" else LinearFFN
            self.compute_layernorm = nn.RMSNorm(hidden, eps=eps)
            self.compute_mlp = form(hidden, shape.compute_intermediate_size)
        if with_memory:
            self.memory_layernorm = nn.RMSNorm(hidden, eps=eps)
            self.memory_mlp = SwiGLU(hidden, shape.intermediate_size)

    def forward(self, x: Tensor, x0: Tensor, read: MemoryReader | None, **kwargs: Any) -> Tensor:
        """x, x0 [batch, sequence, hidden] -> the same shape. `read`: FFN-M's output from a ToL."""
        y = x + self.self_attn(self.input_layernorm(x), **kwargs)[0]
        if self.compute_mlp is not None:
            y = y + self.compute_mlp(self.compute_layernorm(y if self.after_attention else x))
        if self.alpha == 0.0 and not self.training:
            return y  # a dropped layer reads nothing; in training it still needs zero gradients
        memory = self.memory_mlp(self.memory_layernorm(x0)) if read is None else read(self.layer_idx)
        return y + (memory if self.alpha == 1.0 else self.alpha * memory)


class MemoryLLMPreTrainedModel(PreTrainedModel):
    """What transformers asks of a class of models."""

    config: MemoryLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryLLMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MemoryLLMDecoderLayer,
        "attentions": MemoryLLMAttention,
    }


class MemoryLLMModel(MemoryLLMPreTrainedModel):
    """The model without its head. `tol`: a ToL's folder; FFN-M then has no weights here, nor has the
    embedding if the table has it.
    """

    def __init__(self, config: MemoryLLMConfig, tol: str | Path | None = None) -> None:
        super().__init__(config)
        shape = config.model_config()  # refuses what the model cannot express
        self.angles_of = partial(rotary_angles, shape.attention_head_dim, shape.rope_theta)
        self.table: TolSource | None = None if tol is None else open_table(tol, config)
        self.embed_tokens: nn.Module
        if self.table is not None and self.table.has_embeddings:
            self.embed_tokens = TableEmbedding(self.table)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if self.table is not None:
            absent = ("embed_tokens", *FFN_M) if self.table.has_embeddings else FFN_M
            self._keys_to_ignore_on_load_unexpected = {rf"\b{name}\." for name in absent}
        self.layers = nn.ModuleList(
            MemoryLLMDecoderLayer(config, shape, layer, tol is None)
            for layer in range(shape.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def use_tol(self, folder: str | Path) -> Self:
        """Look FFN-M's output up in a ToL from now on, and x0 if it is there; drop their weights.

        Returns the model. Raises UserError for a damaged table, for one of another model, and for one without
        embeddings after one with them.
        """
        table = open_table(folder, self.config)
        if isinstance(self.embed_tokens, TableEmbedding) and not table.has_embeddings:
            raise UserError(
                f"{folder} has no embeddings, and the model has none either: load it again with tol={folder}"
            )
        self.table = table
        for layer in self.layers:
            for name in FFN_M:
                layer._modules.pop(name, None)
        if self.table.has_embeddings:
            self.embed_tokens = TableEmbedding(self.table)
        return self

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids int64 [batch, sequence] -> the normed last hidden state [batch, sequence, hidden].

        Arguments as of transformers' Llama. Raises ValueError for inputs_embeds with a ToL, which has a row
        per token id.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x0, read = self._embedded(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + x0.shape[1], device=x0.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x0,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        angles = [part.unsqueeze(1) for part in self.angles_of(position_ids)]
        x = x0
        for layer in self.layers:
            x = layer(
                x,
                x0,
                read,
                angles=angles,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _embedded(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, MemoryReader | None]:
        """x0, and the reader of a ToL; a row that has both is read once."""
        if self.table is None:
            return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds, None
        if input_ids is None:
            raise ValueError("a ToL has a row per token id: give input_ids, not inputs_embeds")
        if self.table.has_embeddings:
            return self.table.open_with_x0(input_ids, self.norm.weight.dtype)
        x0 = self.embed_tokens(input_ids)
        return x0, self.table.open(input_ids, x0)


class MemoryLLMForCausalLM(MemoryLLMPreTrainedModel, GenerationMixin):
    """The model with its head. `tol`: see MemoryLLMModel."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MemoryLLMConfig, tol: str | Path | None = None) -> None:
        super().__init__(config)
        self.model = MemoryLLMModel(config, tol)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def use_tol(self, folder: str | Path) -> Self:
        """Look FFN-M's output up in a ToL from now on; see MemoryLLMModel.use_tol."""
        self.model.use_tol(folder)
        return self

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As PreTrainedModel. UserError for a model with a ToL: without FFN-M it would not be whole."""
        if self.model.table is not None:
            raise UserError("the model has a ToL in place of FFN-M's weights: save one loaded without tol=")
        super().save_pretrained(save_directory, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids int64 [batch, sequence] -> logits [batch, sequence, vocabulary], of the last
        `logits_to_keep` positions where it is not 0.

        labels int64 [batch, sequence], not shifted: also the mean cross-entropy; -100 does not count.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
