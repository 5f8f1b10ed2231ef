"""The models that `bench decode` times: random bfloat16 weights in the paper's shapes, attention shared."""

from typing import Any

import torch
from torch import Tensor, nn

from mlm_train.config import ModelConfig
from mlm_train.inference.cache import KVCache
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from mlm_train.model.unfilled import unfilled
from mlm_train.utils.host_memory import use_huge_pages

DTYPE = torch.bfloat16
SEED = 1234
# Kind: FFN of the base model or FFN-M, and beta of FFN-C, at each shape (the paper's tables 1 and 5).
KINDS = {"base": None, "flex3": 3, "flex2": 2, "flex1": 1, "memory": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "fields": {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
        },
        "ffn": {"base": 5464, "flex3": 3418, "flex2": 4096, "flex1": 4778, "memory": 5464},
    },
    # For tests: takes seconds, and its figures mean nothing.
    "tiny": {
        "fields": {"vocab_size": 512, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "ffn": {"base": 128, "flex3": 80, "flex2": 96, "flex1": 112, "memory": 128},
    },
}


def configs(shape: str, positions: int) -> dict[str, ModelConfig]:
    """Kind -> config, of one of SHAPES."""
    found = {}
    for kind, beta in KINDS.items():
        tree = SHAPES[shape]["fields"] | {"intermediate_size": SHAPES[shape]["ffn"][kind]}
        tree |= {"kind": kind.rstrip("123"), "max_position_embeddings": positions}
        found[kind] = ModelConfig.model_validate(tree | ({"flex_beta": beta} if beta else {}))
    return found


def random_models(by_kind: dict[str, ModelConfig]) -> dict[str, Transformer]:
    """Models without FFN-M and with random weights; all share embedding, attention, norms and head."""
    first, models = None, {}
    for kind, config in by_kind.items():
        with unfilled():
            model = Transformer(config, with_memory=False)
        if first is not None:
            model.embed_tokens, model.norm, model.lm_head = first.embed_tokens, first.norm, first.lm_head
            for layer in range(config.num_hidden_layers):
                block, shared = model.block(layer), first.block(layer)
                block.input_layernorm, block.self_attn = shared.input_layernorm, shared.self_attn
        fill(model)
        models[kind] = model.requires_grad_(False).eval()
        first = first or model
    return models


def fill(model: nn.Module) -> None:
    """Give parameters that have no storage random numbers of a deviation of 0.02; norms ones."""
    drawn = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(SEED))
    drawn = drawn.to(DTYPE)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            data = torch.empty(parameter.shape, dtype=DTYPE)
            use_huge_pages(data.data_ptr(), data.nbytes)  # as those that are loaded
            data.fill_(1)
            if parameter.dim() > 1:
                for part in data.view(-1).split(len(drawn)):
                    part.copy_(drawn[: len(part)])
            setattr(module, name, nn.Parameter(data))


def weights_read(model: Transformer) -> list[Tensor]:
    """The matrices that a decoded token is multiplied with: all but the embedding."""
    assert model.embed_tokens is not None
    embedding = model.embed_tokens.weight
    return [weight for weight in model.parameters() if weight.dim() == 2 and weight is not embedding]


def active_bytes(shape: str, kind: str) -> int:
    """Bytes of weights_read, from the shapes alone."""
    with unfilled():
        model = Transformer(configs(shape, 1)[kind], with_memory=False)
    return sum(weight.numel() for weight in weights_read(model)) * DTYPE.itemsize


def filled_cache(config: ModelConfig, rows: int, columns: int, more: int) -> KVCache:
    """A KV cache with random keys and values in `columns` columns, and room for some more."""
    cache = KVCache(config, columns + more, [0] * rows, DTYPE)
    shape = (rows, config.kv_heads, columns, config.attention_head_dim)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float32).to(DTYPE)
    for layer in range(config.num_hidden_layers):
        cache.layer(layer).append(drawn, drawn)
    cache.advance(columns)
    return cache


def llama(model: Transformer) -> Any:
    """transformers' Llama with the weights of a base model, which it shares."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = model.config
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*fields, "max_position_embeddings", "rms_norm_eps")
    with unfilled():
        found = AutoModelForCausalLM.from_config(
            LlamaConfig(**{name: getattr(config, name) for name in names}, tie_word_embeddings=False),
            attn_implementation="sdpa",
            dtype=DTYPE,
        )
    found.load_state_dict(dict(named_pieces(model)), strict=True, assign=True)
    # The angles are made when the model is, and have no place in a checkpoint.
    found.model.rotary_emb = type(found.model.rotary_emb)(found.config)
    return found.requires_grad_(False).eval()
