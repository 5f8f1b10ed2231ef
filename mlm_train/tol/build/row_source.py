"""Sources of a table's values: FFN-M over embedding rows, or an existing table."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlm_train.checkpoint.hf.folder import FolderTensors
from mlm_train.checkpoint.reading.logical_folder import OpenedModel
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.block import MemoryBlock
from mlm_train.model.logical import pieces
from mlm_train.model.transformer import Transformer
from mlm_train.model.unfilled import unfilled
from mlm_train.tol.format.codec import TORCH_DTYPE, all_finite
from mlm_train.tol.format.index import X0
from mlm_train.tol.format.schemes import PlainDtype
from mlm_train.tol.serve.reader import TableReader

EMBEDDING = "model.embed_tokens.weight"
LayerWeights = dict[str, Tensor]
Arrays = dict[str, tuple[np.ndarray, str, tuple[int, ...]]]  # bytes, type and shape of each


class RowSource(Protocol):
    """Yields the values of rows, layer by layer."""

    def values(self, first: int, last: int) -> Iterator[Tensor]:
        """Yield rows [first, last) of one layer after another, each [n, hidden] in a plain type."""
        ...

    def embedding(self, first: int, last: int) -> Tensor:
        """x0 of rows [first, last), [n, hidden]."""
        ...


def ffn_m_weights(
    tensors: FolderTensors,
    config: ModelConfig,
    layers: Sequence[int],
    compute: PlainDtype = "float32",
    in_place: bool = False,
) -> Iterator[LayerWeights]:
    """Read FFN-M's parameters layer by layer, named as in a MemoryBlock.

    Matmul weights are of type `compute`, those of the norm fp32. in_place: each layer overwrites the tensors
    of the previous one. Raises UserError naming a tensor with NaN or infinite values.
    """
    with unfilled():
        model = Transformer(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights: LayerWeights = {}
    for layer in layers:
        prefix = f"layers.{layer}."
        weights = weights if in_place else {}
        for piece in pieces(model):
            name = piece.parameter.removeprefix(prefix)
            if name == piece.parameter or not name.startswith(("memory_layernorm.", "memory_mlp.")):
                continue
            if name not in weights:
                dtype = TORCH_DTYPE[compute] if name.startswith("memory_mlp.") else torch.float32
                weights[name] = torch.empty(shapes[piece.parameter], dtype=dtype)
            part = piece.of(weights[name])
            part.copy_(tensors.tensor(piece.name))
            if not all_finite(part):
                raise UserError(
                    f"{tensors.path}: tensor {piece.name} has NaN or infinite values; train again"
                )
        yield weights


def ffn_m_blocks(config: ModelConfig, weights: dict[int, LayerWeights]) -> list[MemoryBlock]:
    """Blocks whose `ffn_m` uses these weights without a copy; their other parameters have no storage."""
    blocks = []
    for layer, state in weights.items():
        with unfilled():
            block = MemoryBlock(config, layer).requires_grad_(False)
        block.load_state_dict(state, strict=False, assign=True)
        blocks.append(block)
    return blocks


def to_numpy(weights: LayerWeights) -> Arrays:
    """Each tensor's bytes as a NumPy array, which Ray shares between a node's processes."""
    return {
        name: (
            tensor.view(torch.uint8).numpy(),
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        for name, tensor in weights.items()
    }


def from_numpy(arrays: Arrays) -> LayerWeights:
    """Tensors over shared, read-only arrays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {
            name: torch.from_numpy(array).view(TORCH_DTYPE[dtype]).view(shape)
            for name, (array, dtype, shape) in arrays.items()
        }


class ComputedRows:
    """Computes FFN_M_l(x0) of these layers.

    Equal to MemoryBlock.ffn_m under autocast to `compute`, bit by bit on a CPU (tests/tol/test_compute.py);
    the part of the norms that all layers share is computed once.
    """

    def __init__(
        self,
        model: OpenedModel,
        weights: dict[int, LayerWeights],
        compute: PlainDtype = "float32",
        device: str = "cpu",
    ) -> None:
        self.tensors, self.device = model.tensors, torch.device(device)
        on_device = {
            layer: {name: tensor.to(device) for name, tensor in state.items()}
            for layer, state in weights.items()
        }
        self.blocks = ffn_m_blocks(model.config, on_device)
        self.compute, self.eps = TORCH_DTYPE[compute], model.config.rms_norm_eps

    def values(self, first: int, last: int) -> Iterator[Tensor]:
        """Yield rows [first, last) of one layer after another, on the CPU: [n, hidden] of type `compute`."""
        yield from self.of(self.embedding(first, last).to(self.device, torch.float32))

    def embedding(self, first: int, last: int) -> Tensor:
        """x0 of rows [first, last), on the CPU, in its stored type: [n, hidden]."""
        return self.tensors.rows(EMBEDDING, first, last)

    @torch.no_grad()
    def of(self, x0: Tensor) -> Iterator[Tensor]:
        """Yield FFN-M of embedding rows [n, hidden], as `values` does."""
        unit = functional.rms_norm(x0, x0.shape[-1:], eps=self.eps)
        for block in self.blocks:
            normed = unit * block.memory_layernorm.weight
            yield block.memory_mlp(normed.to(self.compute)).cpu()


class StoredRows:
    """Reads layers of an existing table; UserError if it dropped one of them."""

    def __init__(self, folder: str | Path, layers: Sequence[int]) -> None:
        self.table, self.layers = TableReader.open_folder(folder), layers
        missing = sorted(set(layers) - set(self.table.index.layers))
        if missing:
            raise UserError(f"{folder} does not hold layer {missing[0]}: it was dropped there")

    def values(self, first: int, last: int) -> Iterator[Tensor]:
        """Yield rows [first, last) of one layer after another: [n, hidden]."""
        rows = self.table.range(first, last)
        for layer in self.layers:
            values = self.table.values(rows, layer)
            assert values is not None
            yield values

    def embedding(self, first: int, last: int) -> Tensor:
        """x0 of rows [first, last), of a table that has it: [n, hidden]."""
        x0 = self.table.values(self.table.range(first, last), X0)
        assert x0 is not None
        return x0


def chunks_of(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Split [start, stop) into ranges of at most `size` rows."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
