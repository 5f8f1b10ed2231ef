"""The layers of the three model kinds."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mlm_train.config import ModelConfig
from mlm_train.config.schema import ActivationCheckpointing
from mlm_train.model.attention import Attention, LayerCache
from mlm_train.model.compiled import compiled
from mlm_train.model.feedforward import LinearFFN, SwiGLU
from mlm_train.model.geometry import Geometry
from mlm_train.model.recompute import recomputed
from mlm_train.model.source import MemoryReader


class Block(nn.Module):
    """Common part of all layers: attention, activation checkpointing, torch.compile."""

    recompute: ActivationCheckpointing = "none"
    compiles = False  # whether regions (_run) are compiled

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)

    def set_activation_checkpointing(self, extent: ActivationCheckpointing) -> None:
        """none: keep all activations; selective: not those inside attention; full: inputs only."""
        self.recompute = extent
        self.self_attn.recompute = extent == "selective"

    def _run(self, region: Callable[..., Tensor], *args: object) -> Tensor:
        """region(self, *args), checkpointed under full recomputation.

        `region` is a function of the class, not a bound method, so that all layers share its compiled graph.
        """
        region = self._compiled(region)
        return recomputed(region, self, *args) if self.recompute == "full" else region(self, *args)

    def _compiled(self, region: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return compiled(region) if self.compiles else region


class BaseBlock(Block):
    """Llama: y = x + Attn(N1(x)); x' = y + FFN(N2(y))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        geometry: Geometry,
        read: MemoryReader | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [batch, sequence, hidden] -> the same shape. `read` is not used."""
        return self._run(BaseBlock._layer, x, geometry, cache)

    def _layer(self, x: Tensor, geometry: Geometry, cache: LayerCache | None) -> Tensor:
        y = x + self.self_attn(self.input_layernorm(x), geometry, cache)
        return y + self.mlp(self.post_attention_layernorm(y))


class MemoryBlock(Block):
    """x' = x + Attn(N(x)) [+ FFN_C(N_c(x))] + alpha * m, with m from a memory source.

    `with_memory=False` builds it without FFN-M's weights, to read m from a ToL.
    """

    def __init__(self, config: ModelConfig, layer: int, with_memory: bool = True) -> None:
        super().__init__(config, layer)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.alpha = config.alpha(layer)
        self.compute_mlp: nn.Module | None = None
        if config.kind == "flex":
            form = SwiGLU if config.compute_form == "swiglu" else LinearFFN
            assert config.compute_intermediate_size is not None
            self.after_attention = config.compute_input == "post_attention"
            self.compute_layernorm = nn.RMSNorm(hidden, eps=eps)
            self.compute_mlp = form(hidden, config.compute_intermediate_size)
        if with_memory:
            self.memory_layernorm = nn.RMSNorm(hidden, eps=eps)
            self.memory_mlp = SwiGLU(hidden, config.intermediate_size)

    def ffn_m(self, x0: Tensor) -> Tensor:
        """FFN_M(N_m(x0)) of x0 [..., hidden], the same shape; training and the ToL build both call it."""
        self._mark_rows_dynamic(x0)
        return self._compiled(MemoryBlock._ffn_m)(self, x0)

    def coefficients(self, x0: Tensor) -> Tensor:
        """x0 [..., hidden] -> [..., keys]: c_k = (q . W_up[k]) * silu(q . W_gate[k]) with q = N_m(x0).

        FFN-M's output is the sum of c_k * W_down[:, k] over its keys.
        """
        return self.memory_mlp.coefficients(self.memory_layernorm(x0))

    def ffn_m_of_micro_batch(self, x0: Tensor) -> Tensor:
        """ffn_m, checkpointed under full recomputation."""
        self._mark_rows_dynamic(x0)
        return self._run(MemoryBlock._ffn_m, x0)

    def _mark_rows_dynamic(self, x0: Tensor) -> None:
        """Have torch.compile make one graph for any number of rows."""
        if self.compiles:
            torch._dynamo.maybe_mark_dynamic(x0, 0)

    def _ffn_m(self, x0: Tensor) -> Tensor:
        return self.memory_mlp(self.memory_layernorm(x0))

    def forward(
        self,
        x: Tensor,
        geometry: Geometry,
        read: MemoryReader,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x [batch, sequence, hidden] -> the same shape. The lookup is outside the checkpointed region."""
        y = self._run(MemoryBlock._context, x, geometry, cache)
        if self.alpha == 0.0 and not self.training:
            return y  # a dropped layer reads nothing; in training it still needs zero gradients
        memory = read(self.layer)
        return y + (memory if self.alpha == 1.0 else self.alpha * memory)

    def _context(self, x: Tensor, geometry: Geometry, cache: LayerCache | None) -> Tensor:
        """x + Attn(N(x)) [+ FFN_C(N_c(x))]: the part that depends on earlier tokens."""
        y = x + self.self_attn(self.input_layernorm(x), geometry, cache)
        if self.compute_mlp is None:
            return y
        context = y if self.after_attention else x
        return y + self.compute_mlp(self.compute_layernorm(context))
