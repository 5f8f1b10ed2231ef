"""Causal attention whose backward is a few large matrix products, for compiled layers on a CPU.

torch's own backward there takes many small products, at a fraction of the speed that larger ones reach
(figures: docs/performance.md). Here the scores of a block of keys with a block of queries are computed again,
for all heads at once, and transposed: then two of the three gradients are products without a transposition.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256  # positions, at least: scores of all heads stay near the processor
BLOCKS = 4  # of a sequence, at most: pairs of them are unrolled in the compiled graph
LONGEST = 2048  # sequence; of a longer one a pair's scores would fill the memory
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
    size = max(BLOCK, -(-length // BLOCKS))

    def blocks(rows: Tensor) -> list[Tensor]:
        return [_contiguous(block) for block in rows.split(size, 1)]

    query_blocks, key_blocks, gradient_blocks = blocks(query), blocks(key), blocks(gradient)
    # What is subtracted from a product's result rides in it, as features that meet -1: taken off before the
    # result is rounded to bf16, of which only the difference then needs to be exact.
    delta = (out.to(exact) * gradient.to(exact)).sum(-1)
    queries = list(map(_with, query_blocks, (lse / scale).split(size, 1)))
    gradients = list(map(_with, gradient_blocks, delta.split(size, 1)))
    keys, values = list(map(_against, key_blocks)), list(map(_against, blocks(value)))
    of_query: list[list[Tensor]] = [[] for _ in queries]
    of_key: list[list[Tensor]] = [[] for _ in keys]
    of_value: list[list[Tensor]] = [[] for _ in keys]
    at = torch.arange(size, device=query.device)
    for i in range(len(keys)):
        for j in range(i, len(queries)):
            # Both products, then what is pointwise, as one loop.
            scores, products = torch.bmm(keys[i], queries[j].mT), torch.bmm(values[i], gradients[j].mT)
            p = (scores.to(exact) * scale).exp()
            if i == j:
                p = p.where(at[: p.shape[1], None] <= at[: p.shape[2]], 0.0)
            ds = (products.to(exact) * p).to(query.dtype)
            of_value[i].append(torch.bmm(p.to(query.dtype), gradient_blocks[j]))
            of_key[i].append(torch.bmm(ds, query_blocks[j]))
            of_query[j].append(torch.bmm(ds.mT, key_blocks[i]))
    return _joined(of_query, exact, scale), _joined(of_key, exact, scale), _joined(of_value, exact, 1.0)


def _contiguous(block: Tensor) -> Tensor:
    """A copy in the order of its dimensions, as products want it.

    A compiler lays `contiguous()` out as its source lies, and each product then makes a copy of its own.
    """
    return torch.cat(block.chunk(2))


def _joined(blocks: list[list[Tensor]], exact: torch.dtype, factor: float) -> Tensor:
    """Blocks of rows one after the other, each the sum of its parts times factor, computed in `exact`."""
    sums = [reduce(torch.add, [part.to(exact) for part in parts]) * factor for parts in blocks]
    return torch.cat([some.to(parts[0].dtype) for some, parts in zip(sums, blocks, strict=True)], 1)


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
