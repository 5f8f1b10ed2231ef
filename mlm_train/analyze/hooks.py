"""Activations of a model by TransformerLens's names, and what each part adds to the residual stream."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlm_train.model.block import BaseBlock, Block, MemoryBlock
from mlm_train.model.source import MemoryReader, MemorySource
from mlm_train.model.transformer import Transformer

Cache = dict[str, Tensor]


@contextmanager
def hooks(model: Transformer, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[Cache]:
    """Record activations of each forward pass in the body; the latest pass is in the dictionary yielded.

    Names, for layer l: `blocks.{l}.hook_resid_pre`, `.hook_attn_out`, `.hook_mlp_out` (FFN-C, or a base
    model's FFN), `.hook_memory_out` (FFN-M times alpha), `.hook_resid_post`, all [batch, sequence, hidden],
    and `blocks.{l}.memory.hook_post` (c_k, [batch, sequence, keys]; not where FFN-M is looked up);
    `hook_embed` (x0) and `ln_final.hook_normalized` (what the head reads). resid_post = resid_pre + attn_out
    + mlp_out + memory_out. A part that a layer does not have has no name.

    model: of `mlm_train.load(...)` it is `.decoder.model`. wanted: which names to keep. The model is
    unchanged afterwards; its results are the same within.
    """
    cache: Cache = {}

    def keep(name: str, value: Tensor) -> None:
        if wanted(name):
            cache[name] = value.detach()

    with ExitStack() as watched:

        def after(module: nn.Module | None, name: str) -> None:
            if module is not None:
                hook = module.register_forward_hook(lambda _, __, output: keep(name, output))
                watched.callback(hook.remove)

        x0: Cache = {}
        if model.embed_tokens is not None:
            after(model.embed_tokens, "hook_embed")
            hook = model.embed_tokens.register_forward_hook(lambda _, __, rows: x0.update(x0=rows.detach()))
            watched.callback(hook.remove)
        for number in map(int, model.layers):
            block, at = model.block(number), f"blocks.{number}"
            after(block.self_attn, f"{at}.hook_attn_out")
            after(_mlp(block), f"{at}.hook_mlp_out")
            before = block.register_forward_pre_hook(_before(block, at, keep, wanted, x0))
            watched.callback(before.remove)
            after(block, f"{at}.hook_resid_post")
        after(model.norm, "ln_final.hook_normalized")
        yield cache


def _mlp(block: Block) -> nn.Module | None:
    if isinstance(block, BaseBlock):
        return block.mlp
    return block.compute_mlp if isinstance(block, MemoryBlock) else None


def _before(
    block: Block, at: str, keep: Callable[[str, Tensor], None], wanted: Callable[[str], bool], x0: Cache
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Records a block's input, and has its reader record what the block reads."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, geometry, read, *rest = args
        keep(f"{at}.hook_resid_pre", x)
        if not isinstance(block, MemoryBlock):
            return args
        if "x0" in x0 and hasattr(block, "memory_mlp") and wanted(f"{at}.memory.hook_post"):
            keep(f"{at}.memory.hook_post", block.coefficients(x0["x0"]))
        keep(f"{at}.hook_memory_out", torch.zeros_like(x))  # of a dropped layer, which reads nothing
        return x, geometry, _recorded(read, block.alpha, lambda m: keep(f"{at}.hook_memory_out", m)), *rest

    return hook


def _recorded(read: MemoryReader, alpha: float, keep: Callable[[Tensor], None]) -> MemoryReader:
    def recording(layer: int) -> Tensor:
        memory = read(layer)
        keep(alpha * memory)
        return memory

    return recording


PARTS = {"attention": "attn_out", "ffn": "mlp_out", "ffn_m": "memory_out"}


@torch.inference_mode()
def shares(
    model: Transformer, source: MemorySource | None, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[dict[str, Any]]:
    """What each part adds to the residual stream: a dictionary per layer, of means over all positions.

    update = attn_out + mlp_out + memory_out. Of each part that the layer has (`attention`, `ffn`, `ffn_m`):
    norm, ||part||; ratio, ||part|| / ||update||; share, part . update / ||update||^2, whose sum over parts
    is 1. Also "update", ||update||, and "growth", ||resid_post|| / ||resid_pre||. batches: (ids, labels) as
    of Windows.
    """
    sums: list[dict[str, Any]] = [{} for _ in model.layers]
    tokens = 0
    with hooks(model, lambda name: ".hook_" in name and "memory.hook_post" not in name) as cache:
        for ids, _ in batches:
            model.hidden(ids, source)
            tokens += ids.numel()
            for number, total in enumerate(sums):
                _add(total, lambda name, at=number: cache.get(f"blocks.{at}.hook_{name}"))  # type: ignore[misc]
    return [{"layer": number, **_divided(total, max(tokens, 1))} for number, total in enumerate(sums)]


def _add(total: dict[str, Any], of: Callable[[str], Tensor | None]) -> None:
    before, after = of("resid_pre"), of("resid_post")
    assert before is not None and after is not None
    parts = {name: value for name, hook in PARTS.items() if (value := of(hook)) is not None}
    update = torch.stack(list(parts.values())).sum(0)
    size = update.norm(dim=-1)
    _count(total, "update", size)
    _count(total, "growth", after.norm(dim=-1) / before.norm(dim=-1))
    for name, part in parts.items():
        inner = total.setdefault(name, {})
        _count(inner, "norm", part.norm(dim=-1))
        _count(inner, "ratio", part.norm(dim=-1) / size)
        _count(inner, "share", (part * update).sum(-1) / size.square())


def _count(total: dict[str, Any], name: str, values: Tensor) -> None:
    total[name] = total.get(name, 0.0) + float(values.sum(dtype=torch.float64))


def _divided(total: dict[str, Any], by: int) -> dict[str, Any]:
    return {
        name: _divided(value, by) if isinstance(value, dict) else value / by for name, value in total.items()
    }
