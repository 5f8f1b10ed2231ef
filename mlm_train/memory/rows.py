"""Sums into rows of a table: the backward of a lookup."""

import torch
from torch import Tensor


def add_rows(table: Tensor, index: Tensor, values: Tensor) -> None:
    """table[index[i]] += values[i], in place. table [rows, hidden], index int64 [n], values [n, hidden].

    With train.deterministic the values of a row are summed one after the other, in the order of their
    positions: sorted segments instead of atomic adds, whose order a GPU leaves open.
    """
    values = values.to(table.dtype)
    if not torch.are_deterministic_algorithms_enabled():
        table.index_add_(0, index, values)
        return
    order = index.argsort(stable=True)
    lengths = torch.zeros(len(table), dtype=torch.int64, device=index.device)
    lengths.scatter_add_(0, index, torch.ones_like(index))
    table += torch.segment_reduce(values[order].contiguous(), "sum", lengths=lengths, axis=0, initial=0.0)
