"""MemoryLLM of kinds memory and flex as a model of vLLM: FFN-M computed, or looked up in a ToL.

Attention and SwiGLU are those of vLLM's Llama. Under tensor parallelism the hidden state is whole on each
rank, which therefore reads whole rows; a pipeline's stage reads its own layers' bytes alone.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsPP, SupportsQuant
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from mlm_train.checkpoint.hf.transformers_config import FFN_M
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.source import MemoryReader
from mlm_train.tol.serve.source import TolSource
from mlm_train.vllm.metrics import PublishedCounters
from mlm_train.vllm.options import TolOptions


class LinearFFN(nn.Module):
    """down(up(x)): FFN-C of compute_form linear."""

    def __init__(self, hidden_size: int, intermediate_size: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        shared = {"bias": False, "quant_config": quant_config}
        self.up_proj = ColumnParallelLinear(
            hidden_size, intermediate_size, prefix=f"{prefix}.up_proj", **shared
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, prefix=f"{prefix}.down_proj", **shared
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> the same shape."""
        return self.down_proj(self.up_proj(x)[0])[0]


class MemoryLLMDecoderLayer(nn.Module):
    """x' = x + Attn(N(x)) [+ FFN_C(N_c(x))] + alpha * FFN_M(N_m(x0))."""

    def __init__(self, vllm_config: VllmConfig, shape: ModelConfig, with_memory: bool, prefix: str) -> None:
        super().__init__()
        hidden, eps, quantization = shape.hidden_size, shape.rms_norm_eps, vllm_config.quant_config
        self.layer = extract_layer_index(prefix)
        self.alpha = shape.alpha(self.layer)
        self.after_attention = shape.compute_input == "post_attention"
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.self_attn = LlamaAttention(
            vllm_config.model_config.hf_config,
            hidden,
            shape.num_attention_heads,
            shape.kv_heads,
            shape.max_position_embeddings,
            quant_config=quantization,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.compute_mlp: nn.Module | None = None
        if shape.compute_intermediate_size is not None:  # flex
            self.compute_layernorm = RMSNorm(hidden, eps=eps)
            where, size = f"{prefix}.compute_mlp", shape.compute_intermediate_size
            if shape.compute_form == "swiglu":
                self.compute_mlp = LlamaMLP(hidden, size, "silu", quantization, prefix=where)
            else:
                self.compute_mlp = LinearFFN(hidden, size, quantization, where)
        if with_memory:
            self.memory_layernorm = RMSNorm(hidden, eps=eps)
            self.memory_mlp = LlamaMLP(
                hidden, shape.intermediate_size, "silu", quantization, prefix=f"{prefix}.memory_mlp"
            )

    def forward(
        self, positions: Tensor, x: Tensor, residual: Tensor | None, x0: Tensor, read: MemoryReader | None
    ) -> tuple[Tensor, Tensor]:
        """x, what the layer before this one adds to the residual stream (or the stream itself, without one).

        Returns what this layer adds, and the stream before it: norms add the two, as in vLLM's Llama. All are
        [tokens, hidden]; vLLM's norms write in x and in residual. `read`: FFN-M's output from a ToL, in place
        of x0.
        """
        if residual is None:
            residual, normed = x, self.input_layernorm(x)
        else:
            normed, residual = self.input_layernorm(x, residual)
        added = self.self_attn(positions, normed)
        if self.compute_mlp is not None and self.after_attention:
            normed, residual = self.compute_layernorm(added, residual)
            added = self.compute_mlp(normed)
        elif self.compute_mlp is not None:
            added = added + self.compute_mlp(self.compute_layernorm(residual))
        if self.alpha == 0.0:
            return added, residual  # a dropped layer reads nothing
        memory = self.memory_mlp(self.memory_layernorm(x0)) if read is None else read(self.layer)
        return torch.add(added, memory, alpha=self.alpha), residual


class MemoryLLMModel(nn.Module):
    """The model without its head, or one pipeline stage of it."""

    def __init__(self, vllm_config: VllmConfig, shape: ModelConfig, prefix: str) -> None:
        super().__init__()
        group, hidden = get_pp_group(), shape.hidden_size
        options = TolOptions.of(vllm_config.additional_config)
        _check_widths(shape, vllm_config.parallel_config.tensor_parallel_size, options is None)
        self.embed_tokens: nn.Module = PPMissingLayer()
        if group.is_first_rank or (shape.tie_word_embeddings and group.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                shape.vocab_size, hidden, quant_config=vllm_config.quant_config
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            shape.num_hidden_layers,
            lambda prefix: MemoryLLMDecoderLayer(vllm_config, shape, options is None, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(hidden, eps=shape.rms_norm_eps) if group.is_last_rank else PPMissingLayer()
        # A later stage that computes FFN-M needs x0 too.
        self.sent = ["x"] if options is not None else ["x", "x0"]
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(self.sent, hidden)
        self.table: TolSource | None = None
        if options is not None:
            self.table = self._open(options, vllm_config, shape)
            self.counters = PublishedCounters(self.table.store.counters)

    def _open(self, options: TolOptions, vllm_config: VllmConfig, shape: ModelConfig) -> TolSource:
        """The table, in the process that reads it: its threads would not survive a fork."""
        if vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            raise UserError("a table's rows cannot be read within a CUDA graph: give --enforce-eager too")
        if vllm_config.model_config.enable_prompt_embeds:
            raise UserError("a table has a row per token id: leave --enable-prompt-embeds out")
        return TolSource.of_export(
            options.folder,
            vllm_config.model_config.model,
            shape,
            options.store_options(),
            options.patches,
            [layer for layer in range(self.start_layer, self.end_layer) if shape.alpha(layer)],
            vllm_config.device_config.device_type,
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor | IntermediateTensors:
        """input_ids [tokens], on every stage -> the normed last hidden state [tokens, hidden]."""
        if intermediate_tensors is not None:
            x = intermediate_tensors["x"]
            x0 = intermediate_tensors[self.sent[-1]]
        else:
            x = x0 = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        read: MemoryReader | None = None
        if self.table is not None:
            assert input_ids is not None
            read = self.table.open(input_ids, x)
        else:
            x0 = x0.clone()  # the first layers' norms write in x
        residual: Tensor | None = None
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = layer(positions, x, residual, x0, read)
        if self.table is not None:
            self.counters.publish()
        if get_pp_group().is_last_rank:
            return self.norm(x, residual)[0]
        return IntermediateTensors(dict(zip(self.sent, (x + residual, x0), strict=False)))


def _check_widths(shape: ModelConfig, ranks: int, with_memory: bool) -> None:
    """Raise a UserError for a feed-forward network that tensor-parallel ranks cannot share equally."""
    names = ["intermediate_size"] * with_memory + ["compute_intermediate_size"] * (shape.kind == "flex")
    for name in names:
        if getattr(shape, name) % ranks:
            raise UserError(
                f"{name}={getattr(shape, name)} is not a multiple of --tensor-parallel-size {ranks}: give "
                "a divisor of it"
            )


class MemoryLLMForCausalLM(nn.Module, SupportsPP, SupportsQuant):
    """The model with its head, as vLLM makes and calls it."""

    packed_modules_mapping = {  # noqa: RUF012 - as vLLM declares it
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.shape: ModelConfig = vllm_config.model_config.hf_config.model_config()
        self.model = MemoryLLMModel(vllm_config, self.shape, maybe_prefix(prefix, "model"))
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                self.shape.vocab_size,
                self.shape.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            tied = self.shape.tie_word_embeddings
            self.lm_head = head.tie_weights(self.model.embed_tokens) if tied else head
            self.logits_processor = LogitsProcessor(self.shape.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """input_ids [tokens] -> x0 [tokens, hidden]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """See MemoryLLMModel.forward."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """hidden_states [rows, hidden] -> logits [rows, vocabulary], on the ranks that sample."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load an export's weights; those of FFN-M are left out where there is a table."""
        stacked: dict[str, tuple[str, str | int]] = {f".{part}_proj": (".qkv_proj", part) for part in "qkv"}
        for name in ("memory_mlp", "compute_mlp"):
            if name != "compute_mlp" or self.shape.compute_form == "swiglu":
                for shard, part in enumerate(("gate_proj", "up_proj")):
                    stacked[f".{name}.{part}"] = (f".{name}.gate_up_proj", shard)
        left_out = {f".{name}.": None for name in FFN_M if self.model.table is not None}
        mapper = WeightsMapper(orig_to_new_stacked=stacked, orig_to_new_substr=left_out)
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
