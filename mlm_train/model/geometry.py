"""Where the tokens of a micro-batch stand, and which of them see each other."""

from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.model.rope import rotary_angles


class Geometry(NamedTuple):
    """What attention needs beside its input.

    cos, sin: fp32 [sequence, head_dim], or [batch, 1, sequence, head_dim]. mask: what is added to scores,
    [batch, 1, queries, keys], 0 where a query sees a key, else -inf; None: each sees all that came before.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None


def one_text(config: ModelConfig, start: int, length: int, device: torch.device) -> Geometry:
    """Each row is one text, of which `start` tokens came before."""
    positions = torch.arange(start, start + length, device=device)
    return Geometry(*rotary_angles(config.attention_head_dim, config.rope_theta, positions))


def separate_documents(config: ModelConfig, ids: Tensor, eod_id: int, dtype: torch.dtype) -> Geometry:
    """Rows of several documents, ids int64 [batch, sequence]: each is attended to as if it were alone.

    eod_id is the last token of a document; positions begin again with 0 after it. What a row begins with
    counts as a document, be it the rest of one. The mask is of the scores' dtype: as bools, each layer would
    make such a copy of its own, and keep it for its backward.
    """
    ends = ids == eod_id
    document = ends.cumsum(1) - ends.long()
    places = torch.arange(ids.shape[1], device=ids.device)
    begins = torch.cat((torch.ones_like(ends[:, :1]), ends[:, :-1]), 1)
    positions = places - (places * begins).cummax(1).values
    seen = (document[:, :, None] == document[:, None, :]) & (places[:, None] >= places)
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)
    cos, sin = rotary_angles(config.attention_head_dim, config.rope_theta, positions)
    return Geometry(cos.unsqueeze(1), sin.unsqueeze(1), mask.unsqueeze(1))
