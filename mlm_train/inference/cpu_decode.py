"""Decoding one token in bfloat16 on a CPU: all layers in one or two calls of C++ (cpu_decode.cpp).

Such a token takes the time of reading the weights. torch's products read them nearly as fast, but between
them are some thirty small operations per layer, which find the caches cold, and these are the same in every
model kind: the fewer the weights, the more they count (docs/serving.md).
"""

import ctypes
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlm_train.inference.cache import KVCache
from mlm_train.model.attention import Attention
from mlm_train.model.block import BaseBlock, Block, MemoryBlock
from mlm_train.model.feedforward import LinearFFN, SwiGLU
from mlm_train.model.linear import FusedLinear, Linear
from mlm_train.model.source import MemoryReader
from mlm_train.model.transformer import TokenEmbedding, Transformer
from mlm_train.utils.native import compiled_library

GRAIN = 2**20  # bytes of weights per layer and thread: of fewer, waiting for each other takes longer
SOURCE = Path(__file__).with_name("cpu_decode.cpp")
# The modules that the C++ knows; one of a subclass may compute something else.
MODULES = {
    *(Transformer, nn.ModuleDict, TokenEmbedding, BaseBlock, MemoryBlock, nn.RMSNorm, Attention),
    *(SwiGLU, LinearFFN, FusedLinear, Linear),
}


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "ffn")),
        *((name, c_int64) for name in ("gated", "after_attention")),
        *((name, c_float) for name in ("eps", "alpha")),
        *((name, c_void_p) for name in ("norm", "qkv", "out", "ffn_norm", "up", "down")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("layers", "norm", "head")),
        ("vocabulary", c_int64),
        ("eps", c_float),
    )


class _Token(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("columns", "threads", "head_stride", "layer_stride")),
        *((name, c_void_p) for name in ("x", "keys", "values", "cos", "sin", "memory", "scratch")),
    )


class CpuDecode:
    """The layers and the head of a model for one token at a time; `of` makes it.

    Results are those of the model up to rounding. Weights may change in place; others that are put in their
    place are not seen.
    """

    def __init__(self, library: ctypes.CDLL, model: Transformer) -> None:
        self._model = model
        blocks = _blocks(model)
        self._layers = (_Layer * len(blocks))(*map(_described, blocks))
        self._hooks = [
            hooks
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._unwatched_at = -1  # value of torch's counter of hooks when there were none here
        # Whose addresses the C++ has: they must not be freed, even where a parameter gets other data.
        self._held = [weight.detach() for weight in model.parameters()]
        norm, head = model.norm, model.head_weight
        assert norm is not None
        self._weights = _Model(
            layers=ctypes.addressof(self._layers),
            norm=norm.weight.data_ptr(),
            head=head.data_ptr(),
            vocabulary=len(head),
            eps=norm.eps,
        )
        read = head.nbytes + sum(weight.nbytes for weight in model.layers.parameters())
        self._threads = max(1, read // (len(blocks) + 1) // GRAIN)
        config = model.config
        width = 2 * (config.num_attention_heads + config.kv_heads) * config.attention_head_dim
        self._scratch = width + config.hidden_size + max(layer.ffn for layer in self._layers)  # floats
        self._recalls = any(layer.alpha for layer in self._layers)
        self._decode = library.decode
        self._decode.argtypes = [POINTER(_Model), c_int64, c_int64, POINTER(_Token), c_void_p]

    @classmethod
    def of(cls, model: Transformer) -> Self | None:
        """None for a model that is not in bfloat16 on a CPU, and where there is no compiler."""
        if not _applies(model):
            return None
        library = compiled_library(SOURCE)
        return None if library is None else cls(library, model)

    def takes(self, ids: Tensor, cache: KVCache) -> bool:
        """Whether `logits` can go on from a cache with ids [rows, columns]: one token of an unpadded row.

        Not while someone watches the modules, whose hooks would not be called.
        """
        return (
            ids.numel() == 1
            and not cache.padded
            and cache.layers().keys.dtype == torch.bfloat16
            and not self._watched()
        )

    def _watched(self) -> bool:
        """Whether a module has a hook. They are looked for only once there are new ones in this process."""
        if self._unwatched_at != RemovableHandle.next_id:
            if any(self._hooks):
                return True
            self._unwatched_at = RemovableHandle.next_id
        return False

    def logits(self, x0: Tensor, read: MemoryReader | None, cache: KVCache) -> Tensor:
        """x0 [1, 1, hidden], after what is cached of one row -> logits [1, vocabulary]."""
        layers, cached, geometry = self._layers, cache.layers(), cache.geometry(1, 1)
        x = x0.flatten().float()
        # Not torch.empty, whose dtype and device are defaults that anyone may set.
        scratch = x.new_empty(self._scratch)
        token = _Token(
            columns=cached.length,
            threads=min(self._threads, torch.get_num_threads()),
            head_stride=cached.keys.stride(2),
            layer_stride=cached.keys.stride(0),
            x=x.data_ptr(),
            keys=cached.keys.data_ptr(),
            values=cached.values.data_ptr(),
            cos=geometry.cos.data_ptr(),
            sin=geometry.sin.data_ptr(),
            scratch=scratch.data_ptr(),
        )
        rows: Tensor | None = None
        first = 0
        if self._recalls:
            assert read is not None, "a model with FFN-M needs a memory source"
            self._decode(self._weights, 0, 1, token, None)  # while the token's row is read
            rows, first = self._recalled(read, x0).to(x0).contiguous(), 1
            token.memory = rows.data_ptr()
        logits = x.new_empty(1, self._weights.vocabulary, dtype=x0.dtype)
        self._decode(self._weights, first, len(layers), token, logits.data_ptr())
        cache.advance(1)
        return logits

    def _recalled(self, read: MemoryReader, x0: Tensor) -> Tensor:
        """FFN-M's output in all layers, [layers, hidden]; of those where nothing is added, any."""
        of_token = getattr(read, "of_token", None)  # of a TokenReader
        rows = None if of_token is None else of_token()
        shape = len(self._layers), self._layers[0].hidden
        if rows is not None:
            return rows.view(shape)
        none = x0.new_zeros(shape[1])
        found = [read(number).flatten() if layer.alpha else none for number, layer in enumerate(self._layers)]
        return torch.stack([row.to(x0) for row in found]).view(shape)


def _applies(model: Transformer) -> bool:
    """Whether the model is a whole one, of modules and weights that the C++ knows."""
    return (
        model.norm is not None
        and len(model.layers) == model.config.num_hidden_layers
        and all(type(module) in MODULES for module in model.modules())
        and not any(block.compiles for block in _blocks(model))
        and all(
            type(weight) is nn.Parameter  # not one that is sharded or quantised
            and weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            for weight in model.parameters()
        )
    )


def _blocks(model: Transformer) -> list[Block]:
    return [model.block(int(number)) for number in model.layers]


def _ffn(block: Block) -> tuple[nn.RMSNorm | None, nn.Module | None]:
    """The FFN that is computed for each token, and its norm."""
    if isinstance(block, BaseBlock):
        return block.post_attention_layernorm, block.mlp
    assert isinstance(block, MemoryBlock)
    return (None, None) if block.compute_mlp is None else (block.compute_layernorm, block.compute_mlp)


def _described(block: Block) -> _Layer:
    """Sizes and addresses of a layer's weights."""
    attention, (norm, ffn) = block.self_attn, _ffn(block)
    layer = _Layer(
        hidden=attention.o_proj.out_features,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        eps=block.input_layernorm.eps,
        alpha=getattr(block, "alpha", 0.0),
        norm=block.input_layernorm.weight.data_ptr(),
        qkv=attention.qkv_proj.weight.data_ptr(),
        out=attention.o_proj.weight.data_ptr(),
    )
    if norm is not None:
        assert isinstance(ffn, SwiGLU | LinearFFN)
        layer.ffn, layer.gated = ffn.down_proj.in_features, isinstance(ffn, SwiGLU)
        layer.after_attention = getattr(block, "after_attention", True)
        up = ffn.gate_up_proj if isinstance(ffn, SwiGLU) else ffn.up_proj
        layer.ffn_norm, layer.up = norm.weight.data_ptr(), up.weight.data_ptr()
        layer.down = ffn.down_proj.weight.data_ptr()
    return layer
