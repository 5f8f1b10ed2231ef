"""The coefficients c_k of a layer, computed for some tokens at a time."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlm_train.checkpoint.reading.logical_folder import ModelFolder, open_model
from mlm_train.tol.build.row_source import EMBEDDING, ffn_m_blocks, ffn_m_weights

CHUNK = 1024  # tokens at once
RUN = 16  # consecutive ids that a shuffled order keeps together: one read
_MAPPED = 4  # chunks that are read before the files are opened anew


class LayerKeys:
    """FFN-M of one layer as keys and values (arXiv 2602.00398): c_k = (q . W_up[k]) * silu(q . W_gate[k]).

    q = N_m(x0[t]) for token t. Only this layer's FFN-M is in memory, in fp32; x0 is read in pieces. The
    folder's files are not verified here. Raises UserError naming a tensor with NaN or infinite values.
    """

    def __init__(self, model: ModelFolder, layer: int) -> None:
        self._folder, self._reads = model, 0
        self.vocab_size, self.keys = model.config.vocab_size, model.config.intermediate_size
        self._tensors = open_model(model).tensors
        (weights,) = ffn_m_weights(self._tensors, model.config, [layer])
        (self._block,) = ffn_m_blocks(model.config, {layer: weights})

    @property
    def values(self) -> Tensor:
        """The keys' values, W_down fp32 [hidden, keys]."""
        return self._block.memory_mlp.down_proj.weight

    def digest(self) -> str:
        """SHA-256 of the layer's FFN-M in fp32: of which model's layer something was computed."""
        total = hashlib.sha256()
        for _, weight in sorted(self._block.named_parameters()):
            if not weight.is_meta:
                total.update(weight.numpy().data)
        return total.hexdigest()

    @torch.no_grad()
    def of(self, ranges: Sequence[range]) -> Tensor:
        """c of the tokens in ranges of ids, fp32 [n, keys]."""
        self._reads += 1
        if self._reads % _MAPPED == 0:  # else all pages of a mapped embedding would end up in memory
            self._tensors = open_model(self._folder).tensors
        rows = [self._tensors.rows(EMBEDDING, one.start, one.stop) for one in ranges]
        return self._block.coefficients(torch.cat(rows).float())

    def chunks(self, order: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All tokens' ids int64 [n] and c fp32 [n, keys], at most CHUNK together.

        order: shuffles runs of RUN ids, since ids are sorted by frequency in most vocabularies; None:
        ascending.
        """
        starts = torch.arange(0, self.vocab_size, RUN)
        if order is not None:
            starts = starts[torch.randperm(len(starts), generator=order)]
        for some in starts.split(CHUNK // RUN):
            ranges = [range(start, min(start + RUN, self.vocab_size)) for start in some.tolist()]
            yield torch.cat([torch.arange(one.start, one.stop) for one in ranges]), self.of(ranges)
