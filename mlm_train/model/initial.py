"""Initial weights: a counter-based normal, so that any slice of a tensor is drawn alone.

Element i of a tensor depends on (seed, export name, i) only: it is the same in every layout, and no rank
draws more than its own slices. Philox (Salmon et al., SC 2011) gives 64 random bits per element, and the
Box-Muller transform one normal number of them.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mlm_train.config import ModelConfig
from mlm_train.model.logical import Target, targets

BLOCK = 2**16  # elements that are drawn at once: its temporaries fit in a core's cache
PER_COUNT = 4  # 64-bit numbers per value of Philox's counter


def draw(
    config: ModelConfig,
    seed: int,
    name: str,
    shape: Sequence[int],
    offset: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
) -> Tensor:
    """The initial value of a logical tensor of `shape`, or its slice of `size` at `offset`: fp32, on the CPU.

    Norms are 1; weights that write to the residual stream have std / sqrt(2 * layers).
    """
    offset, size = offset or [0] * len(shape), size or shape
    if name.endswith("norm.weight"):
        return torch.ones(*size)
    std = config.init_std
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.num_hidden_layers)
    (rows, columns), (first_row, first_column), width = size, offset, shape[1]
    out = np.empty((rows, columns), dtype=np.float32)
    key = np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], dtype="<u8")
    if columns == width:
        _fill_normal(out.reshape(-1), key, first_row * width)
    else:
        for row in range(rows):
            _fill_normal(out[row], key, (first_row + row) * width + first_column)
    return torch.from_numpy(out).mul_(std)


def _fill_normal(out: np.ndarray, key: np.ndarray, start: int) -> None:
    """Fill a vector with the standard normals start, start + 1, ... of a key."""
    for low in range(0, len(out), BLOCK):
        block = out[low : low + BLOCK]
        count, skipped = divmod(start + low, PER_COUNT)
        bits = np.random.Philox(key=key, counter=count).random_raw(skipped + len(block))[skipped:]
        np.log(_uniform(bits >> np.uint64(32)), out=block)
        block *= -2.0
        np.sqrt(block, out=block)
        angle = _uniform(bits)
        angle *= np.float32(2 * math.pi)
        block *= np.cos(angle, out=angle)


def _uniform(bits: np.ndarray) -> np.ndarray:
    """The lower 32 of 64 random bits -> fp32 in (0, 1]."""
    values = bits.astype(np.uint32).astype(np.float32)
    values += 1.0
    values *= np.float32(2.0**-32)
    return values


def fill_initial(held: Iterable[Target], config: ModelConfig, seed: int) -> None:
    """Fill pieces with their initial values; padding is not written."""
    for target in held:
        piece, view = target.piece, target.view
        view.copy_(draw(config, seed, piece.name, piece.shape, piece.offset, view.shape))


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill a model's parameters, in place."""
    fill_initial(targets(model), config, seed)
