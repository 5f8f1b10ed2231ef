"""Positions of the tokens of a micro-batch, and which of them attend to each other."""

from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.model.rope import rotary_angles


class Geometry(NamedTuple):
    """Rotary angles and mask of attention.

    cos, sin: fp32 [sequence, head_dim], or [batch, 1, sequence, head_dim]. mask: [batch, 1, queries, keys]
    or [queries, keys], added to the scores: 0 where a query attends to a key, else -inf; or of bools, True
    where it does. None: plain causal attention; a single query attends to all keys.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None


def single_document(config: ModelConfig, length: int, device: torch.device | str) -> Geometry:
    """Geometry of rows that are one document each, at positions 0 to length - 1."""
    positions = torch.arange(length, device=device)
    return Geometry(*rotary_angles(config.attention_head_dim, config.rope_theta, positions))


def separate_documents(config: ModelConfig, ids: Tensor, eod_id: int, dtype: torch.dtype) -> Geometry:
    """Geometry of rows of several documents, ids int64 [batch, sequence]; none attends to another.

    eod_id is the last token of a document; positions start again at 0 after it. The start of a row counts
    as the start of a document, even in the middle of one. The mask has the scores' `dtype`: from bools each
    layer would make its own such copy and keep it for its backward.
    """
    ends = ids == eod_id
    document = ends.cumsum(1) - ends.long()
    offsets = torch.arange(ids.shape[1], device=ids.device)
    starts = torch.cat((torch.ones_like(ends[:, :1]), ends[:, :-1]), 1)
    positions = offsets - (offsets * starts).cummax(1).values
    attends = (document[:, :, None] == document[:, None, :]) & (offsets[:, None] >= offsets)
    mask = torch.zeros_like(attends, dtype=dtype).masked_fill(~attends, -torch.inf)
    cos, sin = rotary_angles(config.attention_head_dim, config.rope_theta, positions)
    return Geometry(cos.unsqueeze(1), sin.unsqueeze(1), mask.unsqueeze(1))
