"""Pruning of one weight matrix [out, in]: by magnitude, Wanda and SparseGPT, from their papers."""

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = 128  # that SparseGPT chooses and prunes together
DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it


class InputMoments:
    """The mean of x x^T over the inputs x of a linear layer, fp32 [in, in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.mean = torch.zeros(width, width, device=device)
        self.positions = 0

    def add(self, x: Tensor) -> None:
        """Count inputs [..., in]."""
        rows = x.flatten(0, -2).float()
        self.positions += len(rows)
        share = len(rows) / self.positions
        self.mean.mul_(1 - share).addmm_(rows.T, rows, alpha=share / len(rows))


def magnitude(weight: Tensor, moments: InputMoments, sparsity: float) -> Tensor:
    """Zero the smallest |W| of the whole matrix. moments are not used. Returns a new matrix."""
    return weight.masked_fill(_smallest(weight.abs().flatten(), sparsity).view_as(weight), 0)


def wanda(weight: Tensor, moments: InputMoments, sparsity: float) -> Tensor:
    """Zero the smallest |W_ij| * ||x_j|| of each output (arXiv 2306.11695). Returns a new matrix."""
    norms = moments.mean.diagonal().sqrt()
    return weight.masked_fill(_smallest(weight.abs().float() * norms, sparsity), 0)


def sparsegpt(weight: Tensor, moments: InputMoments, sparsity: float) -> Tensor:
    """Zero, COLUMNS at a time, the weights whose loss changes the output least, and have the columns to their
    right make up for them (arXiv 2301.00774, algorithm 1). Returns a new matrix.
    """
    pruned, hessian = weight.double(), 2 * moments.mean.double()
    dead = hessian.diagonal() == 0  # inputs that are always 0
    hessian.diagonal()[dead] = 1
    pruned[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    # Row j of the upper factor of the inverse: how columns from j on make up for an error in column j.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, pruned.shape[1], COLUMNS):
        stop = min(start + COLUMNS, pruned.shape[1])
        block, own = pruned[:, start:stop], factor[start:stop, start:stop]
        scores = (block / own.diagonal()).square()
        zeros = _smallest(scores.flatten(), sparsity).view_as(block)
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            lost = block[:, column] * zeros[:, column]
            errors[:, column] = lost / own[column, column]
            block[:, column:] -= errors[:, column].outer(own[column, column:])
            block[:, column][zeros[:, column]] = 0
        pruned[:, stop:] -= errors @ factor[start:stop, stop:]
    return pruned.to(weight.dtype)


METHODS: dict[str, Callable[[Tensor, InputMoments, float], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}


def output_error(weight: Tensor, pruned: Tensor, moments: InputMoments) -> float:
    """||(W - W') X||^2 / ||W X||^2 over the inputs that were counted."""
    mean = moments.mean.double()

    def size(matrix: Tensor) -> Tensor:
        return ((matrix @ mean) * matrix).sum()

    whole = weight.double()
    return float(size(whole - pruned.double()) / size(whole))


def _smallest(scores: Tensor, share: float) -> Tensor:
    """A mask of this share of the scores of each row [..., n], the smallest; exactly round(share * n)."""
    count = round(share * scores.shape[-1])
    chosen = scores.topk(count, dim=-1, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
