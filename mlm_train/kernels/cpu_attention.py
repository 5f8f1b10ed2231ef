"""Causal attention whose backward is a few large matmuls, for compiled layers on a CPU.

torch's own backward does many small matmuls, at a fraction of the speed of larger ones (figures:
docs/performance.md). Here the scores of a block of keys with a block of queries are recomputed for all heads
at once, and transposed: then two of the three gradients are matmuls without a transposition.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_BLOCK = 256  # positions: the scores of a pair of blocks should stay in the cache
MAX_BLOCKS = 4  # per sequence: pairs of blocks are unrolled in the compiled graph
MAX_SEQUENCE = 2048  # positions: the scores of a pair of larger blocks take too much memory
FEATURE_MULTIPLE = 32  # rows are padded to a multiple of this many features, which matmuls process at once


def causal_attention_applies(query: Tensor, key: Tensor) -> bool:
    """Whether causal_attention is faster: in a compiled layer, for bf16 on a CPU, without grouped heads."""
    return (
        torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[1] == key.shape[1]
        and query.shape[2] <= MAX_SEQUENCE
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over earlier positions; all [batch, heads, sequence, head_dim]."""
    out: Tensor = _Causal.apply(query, key, value)
    return out


class _Causal(torch.autograd.Function):
    """Forward is torch's CPU kernel, which also returns the scores' log-sum-exp."""

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
        flat = [x.flatten(0, 1) for x in (query, key, value, out, lse, gradient)]
        return tuple(x.view(query.shape) for x in _gradients(*flat))


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. All [heads, sequence, head_dim]; lse fp32 [heads, sequence].

    p = exp(q k / sqrt(d) - lse), ds = p (g v - sum(g out)); dv = p^T g, dq = ds k / sqrt(d),
    dk = ds^T q / sqrt(d).
    """
    length, exact = query.shape[1], lse.dtype
    scale = query.shape[2] ** -0.5
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))

    def blocks(rows: Tensor) -> list[Tensor]:
        return [_contiguous(block) for block in rows.split(size, 1)]

    query_blocks, key_blocks, gradient_blocks = blocks(query), blocks(key), blocks(gradient)
    # Values to subtract from a matmul's result are appended as features whose counterparts are -1: then they
    # are subtracted before the result is rounded to bf16, and only the difference has a rounding error.
    delta = (out.to(exact) * gradient.to(exact)).sum(-1)
    queries = list(map(_with_subtracted, query_blocks, (lse / scale).split(size, 1)))
    gradients = list(map(_with_subtracted, gradient_blocks, delta.split(size, 1)))
    keys, values = list(map(_with_ones, key_blocks)), list(map(_with_ones, blocks(value)))
    of_query: list[list[Tensor]] = [[] for _ in queries]
    of_key: list[list[Tensor]] = [[] for _ in keys]
    of_value: list[list[Tensor]] = [[] for _ in keys]
    at = torch.arange(size, device=query.device)
    for i in range(len(keys)):
        for j in range(i, len(queries)):
            # Both matmuls first, then the pointwise operations, which fuse into one loop.
            scores, dp = torch.bmm(keys[i], queries[j].mT), torch.bmm(values[i], gradients[j].mT)
            p = (scores.to(exact) * scale).exp()
            if i == j:
                p = p.where(at[: p.shape[1], None] <= at[: p.shape[2]], 0.0)
            ds = (dp.to(exact) * p).to(query.dtype)
            of_value[i].append(torch.bmm(p.to(query.dtype), gradient_blocks[j]))
            of_key[i].append(torch.bmm(ds, query_blocks[j]))
            of_query[j].append(torch.bmm(ds.mT, key_blocks[i]))
    return _joined(of_query, exact, scale), _joined(of_key, exact, scale), _joined(of_value, exact, 1.0)


def _contiguous(block: Tensor) -> Tensor:
    """A contiguous copy, as matmuls need it.

    inductor gives `contiguous()` the layout of its input, and then each matmul makes its own copy.
    """
    return torch.cat(block.chunk(2))


def _joined(blocks: list[list[Tensor]], exact: torch.dtype, factor: float) -> Tensor:
    """Concatenate blocks of rows, each the sum of its parts times factor, computed in `exact`."""
    sums = [reduce(torch.add, [part.to(exact) for part in parts]) * factor for parts in blocks]
    return torch.cat([total.to(parts[0].dtype) for total, parts in zip(sums, blocks, strict=True)], 1)


def _with_subtracted(rows: Tensor, subtracted: Tensor) -> Tensor:
    """Append a value per row as features, split into parts whose sum is exact in rows' dtype."""
    return _append(rows, _parts(subtracted, rows.dtype))


def _with_ones(rows: Tensor) -> Tensor:
    """Append -1 features, the counterparts of `_with_subtracted`."""
    count = 3 if rows.dtype == torch.bfloat16 else 1
    return _append(rows, rows.new_full((*rows.shape[:-1], count), -1.0))


def _append(rows: Tensor, features: Tensor) -> Tensor:
    """Append features, and zeros up to a multiple of FEATURE_MULTIPLE."""
    zeros = rows.new_zeros(*rows.shape[:-1], -(rows.shape[-1] + features.shape[-1]) % FEATURE_MULTIPLE)
    return torch.cat((rows, features, zeros), -1)


def _parts(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[...] -> [..., parts]: an fp32 value as the sum of three in bf16, 8 of its 24 bits each."""
    if dtype != torch.bfloat16:
        return values.to(dtype).unsqueeze(-1)
    parts = []
    for _ in range(3):
        # Mask the bits: a compiler may drop a conversion to bf16 and back.
        upper = (values.view(torch.int32) & -0x10000).view(torch.float32)
        parts.append(upper.to(dtype))
        values = values - upper
    return torch.stack(parts, -1)
