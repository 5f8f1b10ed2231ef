"""FFN-M over embedding rows: what a ToL's build writes and its verification recomputes."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mlm_train.checkpoint.hf_folder import FolderTensors
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.block import MemoryBlock
from mlm_train.model.logical import pieces
from mlm_train.model.transformer import Transformer

EMBEDDING = "model.embed_tokens.weight"
LayerWeights = dict[str, Tensor]


def ffn_m_weights(tensors: FolderTensors, config: ModelConfig) -> Iterator[LayerWeights]:
    """FFN-M's fp32 parameters by their names in a MemoryBlock, layer after layer; nothing else is read.

    Raises UserError naming a tensor that holds a NaN or an infinity.
    """
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        weights: LayerWeights = {}
        for piece in pieces(model):
            name = piece.parameter.removeprefix(prefix)
            if name == piece.parameter or not name.startswith(("memory_layernorm.", "memory_mlp.")):
                continue
            if name not in weights:
                weights[name] = torch.empty(shapes[piece.parameter])
            part = piece.of(weights[name])
            part.copy_(tensors.tensor(piece.name))
            if not part.isfinite().all():
                raise UserError(
                    f"{tensors.path}: tensor {piece.name} has NaN or infinite values; train again"
                )
        yield weights


def ffn_m_blocks(config: ModelConfig, weights: Sequence[LayerWeights]) -> list[MemoryBlock]:
    """Blocks whose `ffn_m` runs on `weights`, without a copy; all other parameters have no storage."""
    blocks = []
    for layer, state in enumerate(weights):
        with torch.device("meta"):
            block = MemoryBlock(config, layer).requires_grad_(False)
        block.load_state_dict(state, strict=False, assign=True)
        blocks.append(block)
    return blocks


def to_numpy(weights: LayerWeights) -> dict[str, np.ndarray]:
    """Arrays, which Ray shares between the processes of a node without copies."""
    return {name: tensor.numpy() for name, tensor in weights.items()}


def from_numpy(arrays: dict[str, np.ndarray]) -> LayerWeights:
    """Tensors over shared, read-only arrays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@torch.no_grad()
def table_rows(blocks: Sequence[MemoryBlock], x0: Tensor, dtype: torch.dtype) -> Tensor:
    """FFN_M_l(x0) for each block: x0 fp32 [rows, hidden] -> `dtype` [rows, len(blocks), hidden]."""
    out = torch.empty(x0.shape[0], len(blocks), x0.shape[1], dtype=dtype)
    for position, block in enumerate(blocks):
        out[:, position] = block.ffn_m(x0)
    return out


def chunks_of(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut into ranges of at most `size` rows."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
