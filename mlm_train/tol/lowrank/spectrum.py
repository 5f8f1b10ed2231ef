"""Singular values and vectors of a layer's table T [V, h], from chunks of its rows.

A cut to rank r is T·B·Bᵀ, where B [h, r] holds the first r right singular vectors: no matrix of that rank
is nearer to T in the Frobenius norm (Eckart and Young, 1936). A row then stores r numbers, its row of T·B.
T is never whole in memory: the eigenvectors of TᵀT [h, h] are the right singular vectors of T, its
eigenvalues the squared singular values.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_ROWS = 2048  # of one fp32 product, whose error grows with the numbers it adds
_COLUMNS = 512  # of one product: narrow enough to leave out most of the upper triangle, and still fast


class Gram:
    """TᵀT of one layer: products of a chunk in fp32, their sum in fp64, of the lower triangle alone.

    Equal chunks in equal order give equal bits at an equal thread count, and so do sums of Grams.
    """

    def __init__(self, hidden: int) -> None:
        self.products = torch.zeros(hidden, hidden, dtype=torch.float64)  # unfinished above the diagonal

    def add(self, chunk: Tensor) -> None:
        """Take in rows [n, h] of any floating dtype, whose sums of squares fp32 can hold (1e-15 to 1e15)."""
        for rows in chunk.split(_ROWS):
            rows = rows.float()
            for first in range(0, rows.shape[1], _COLUMNS):
                last = first + _COLUMNS
                self.products[first:, first:last] += rows[:, first:].T @ rows[:, first:last]

    def __add__(self, other: "Gram") -> "Gram":
        """The Gram of both sets of rows; a new one, since a received one may be read-only."""
        total = Gram(len(self.products))
        torch.add(self.products, other.products, out=total.products)
        return total


@dataclass(frozen=True)
class Spectrum:
    """Singular values [h], descending, and right singular vectors [h, h], one a row, of a table; fp64.

    An eigenvalue of an fp32 Gram is off by up to about 1e-7 of the largest one. A singular value is its
    root: right to 3 digits down to a hundredth of the largest, and noise below 3e-4 of the largest, never
    above that. So `error` is right to 3 digits down to 1e-2 and within 2 % at 1e-3, below what rounding to
    bfloat16 costs (1.7e-3), and the basis cuts nearer to the optimum than that: noise only mixes
    directions of nearly equal singular values.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, gram: Gram) -> Self:
        """The spectrum of a table; equal bits for equal Grams. ValueError where rows were not finite."""
        # No entry of a Gram is larger than the largest of its diagonal.
        if not gram.products.diagonal().isfinite().all():
            raise ValueError("the table has NaN, infinite or huge values (above 1e15)")
        eigenvalues, columns = torch.linalg.eigh(gram.products, UPLO="L")
        values = eigenvalues.flip(0).clamp_min(0).sqrt()  # noise can make small ones negative
        vectors = columns.T.flip(0)
        # v and -v serve alike: take the one whose largest component, the first of equals, is positive.
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        return cls(values, (vectors * largest.sign()).contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """Both for a file, the vectors in fp32."""
        return {"values": self.values, "vectors": self.vectors.float()}

    @property
    def hidden(self) -> int:
        """Columns of the table, h."""
        return len(self.values)

    @property
    def energy(self) -> float:
        """||T||², the sum of the squared singular values."""
        return float(self.values.square().sum())

    def error(self, rank: int) -> float:
        """||T - T·B·Bᵀ|| / ||T|| of the cut to `rank` in 0..h, Frobenius norms; 0 for a table of zeros."""
        lost = float(self.values[rank:].square().sum())
        return (lost / self.energy) ** 0.5 if lost else 0.0

    def basis(self, rank: int) -> Tensor:
        """Bᵀ [rank, h] with orthonormal rows, `rank` in 0..h: a row t of T is cut to (t·B)·Bᵀ."""
        return self.vectors[:rank].clone()  # a view would take the whole matrix along when it is sent


def scaled_basis(spectrum: Spectrum, rank: int, rows: int) -> Tensor:
    """The basis [rank, h], each row times the root mean square that its column of the U part would have.

    All columns of the U part then have the same size, so that neighbours share a scale without loss:
    otherwise the first, which belong to the largest singular values, would set it for all of their group.
    A row is not made smaller than a hundredth of the first, for the sake of float16.
    """
    sizes = spectrum.values[:rank] / rows**0.5
    sizes = sizes.clamp_min(max(0.01 * float(sizes[0]), 1e-6))
    return spectrum.basis(rank) * sizes.unsqueeze(1).to(spectrum.vectors.dtype)
