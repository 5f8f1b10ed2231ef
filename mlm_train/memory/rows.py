"""Row lookups, and their backward: sums into rows of a table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def add_rows(table: Tensor, index: Tensor, values: Tensor) -> None:
    """table[index[i]] += values[i], in place. table [rows, hidden], index int64 [n], values [n, hidden].

    With train.deterministic the values of a row are summed in the order of their positions: sorted segments
    instead of atomic adds, whose order is undefined on a GPU.
    """
    values = values.to(table.dtype)
    if not torch.are_deterministic_algorithms_enabled():
        table.index_add_(0, index, values)
        return
    order = index.argsort(stable=True)
    lengths = torch.zeros(len(table), dtype=torch.int64, device=index.device)
    lengths.scatter_add_(0, index, torch.ones_like(index))
    table += torch.segment_reduce(values[order].contiguous(), "sum", lengths=lengths, axis=0, initial=0.0)


class Lookup(torch.autograd.Function):
    """rows[index], in the dtype of `gradient`; the backward adds into `gradient` and gives the anchor zeros.

    `done` is called at the backward's end.

    The anchor, shape [1], requires a gradient, so that autograd runs the backward. Zero-bubble schedules run
    it only if it leads to a parameter of the stage: the anchors of FFN-M's tables are parameters, one per
    layer, in no optimizer and no checkpoint.
    """

    @staticmethod
    def forward(
        ctx: Any,
        index: Tensor,
        rows: Tensor,
        gradient: Tensor,
        anchor: Tensor,
        done: Callable[[], None] | None = None,
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.gradient, ctx.done = gradient, done
        return rows[index].to(gradient.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor, None]:
        (index,) = ctx.saved_tensors
        add_rows(ctx.gradient, index.reshape(-1), grad.reshape(-1, grad.shape[-1]))
        if ctx.done is not None:
            ctx.done()
        return None, None, None, grad.new_zeros(1), None
