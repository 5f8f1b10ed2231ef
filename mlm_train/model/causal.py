"""Causal attention whose backward is a few large matrix products, for compiled layers on a CPU.

torch's own backward there takes many small products, at a fraction of the speed that large ones reach
(figures: docs/performance.md). Here the scores of a block of keys with all later queries are computed again,
transposed: then two of the three gradients are products without a transposition.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KEYS = 256  # of a block
LONGEST = 2048  # sequence; blocks are unrolled in the compiled graph, and their scores are in memory
WIDTH = 32  # features that a product takes at once: rows are padded to a multiple


def by_blocks(query: Tensor, key: Tensor) -> bool:
    """Whether causal_attention is the faster way: in a compiled layer, for bf16 on a CPU, without groups."""
    return (
        torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[1] == key.shape[1]
        and query.shape[2] <= LONGEST
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the positions so far; all [batch, heads, sequence, head_dim]."""
    out: Tensor = _Causal.apply(query, key, value)
    return out


class _Causal(torch.autograd.Function):
    """Forward is torch's kernel for CPUs, which also gives the scores' log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(query, key, value, 0.0, True)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        rows = [part.flatten(0, 1) for part in (query, key, value, out, lse, gradient)]
        return tuple(part.view(query.shape) for part in _gradients(*rows))


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value. All [heads, sequence, head_dim], lse fp32 [heads, sequence].

    p = exp(q k / sqrt(d) - lse), ds = p (g v - sum(g out)); dv = p^T g, dq = ds k / sqrt(d),
    dk = ds^T q / sqrt(d).
    """
    length, exact = query.shape[1], lse.dtype
    scale = query.shape[2] ** -0.5
    # What is subtracted from a product's result rides in it, as features that meet -1: taken off before the
    # result is rounded to bf16, of which only the difference then needs to be exact.
    queries = _with(query, lse / scale)
    gradients = _with(gradient, (out.to(exact) * gradient.to(exact)).sum(-1))
    keys, values = _against(key), _against(value)
    of_query = list(query.new_zeros(query.shape, dtype=exact).split(KEYS, 1))
    of_key, of_value = [], []
    at = torch.arange(length, device=query.device)
    for start in range(0, length, KEYS):
        block, later = slice(start, min(start + KEYS, length)), slice(start, length)
        scores = torch.bmm(_part(keys, block), _part(queries, later).mT)
        products = torch.bmm(_part(values, block), _part(gradients, later).mT)
        p = (scores.to(exact) * scale).exp().where(at[block, None] <= at[later], 0.0)
        ds = (products.to(exact) * p).to(query.dtype)
        of_value.append(torch.bmm(p.to(query.dtype), _part(gradient, later)))
        of_key.append(torch.bmm(ds, _part(query, later)) * scale)
        for number, part in enumerate(torch.bmm(ds.mT, _part(key, block)).split(KEYS, 1), start // KEYS):
            of_query[number] = of_query[number] + part
    return (torch.cat(of_query, 1) * scale).to(query.dtype), torch.cat(of_key, 1), torch.cat(of_value, 1)


def _part(rows: Tensor, some: slice) -> Tensor:
    """[heads, some, features]: contiguous, without which products take up to twice as long."""
    return rows[:, some].contiguous()


def _with(rows: Tensor, subtracted: Tensor) -> Tensor:
    """Rows and a number of each as further features, in parts that together are exact in rows' dtype."""
    return _beside(rows, _parts(subtracted, rows.dtype))


def _against(rows: Tensor) -> Tensor:
    """Rows that meet those of `_with`."""
    count = 3 if rows.dtype == torch.bfloat16 else 1
    return _beside(rows, rows.new_full((*rows.shape[:-1], count), -1.0))


def _beside(rows: Tensor, more: Tensor) -> Tensor:
    """Further features, and zeros up to a multiple of WIDTH."""
    zeros = rows.new_zeros(*rows.shape[:-1], -(rows.shape[-1] + more.shape[-1]) % WIDTH)
    return torch.cat((rows, more, zeros), -1)


def _parts(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """[...] -> [..., parts]: an fp32 number as the sum of three in bf16, 8 of its 24 bits each."""
    if dtype != torch.bfloat16:
        return numbers.to(dtype).unsqueeze(-1)
    parts = []
    for _ in range(3):
        # Bits are cut off: a compiler may leave a conversion there and back again out.
        upper = (numbers.view(torch.int32) & -0x10000).view(torch.float32)
        parts.append(upper.to(dtype))
        numbers = numbers - upper
    return torch.stack(parts, -1)
