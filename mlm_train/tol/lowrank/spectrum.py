"""Singular values and vectors of a layer's table T [V, h], from chunks of its rows.

A cut to rank r is T·B·Bᵀ, where B [h, r] holds the first r right singular vectors: no matrix of that rank
is nearer to T in the Frobenius norm (Eckart and Young, 1936). A row then stores r values, its row of T·B.
T is never in memory as a whole: the eigenvectors of TᵀT [h, h] are the right singular vectors of T, its
eigenvalues the squared singular values.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_ROWS = 2048  # of one fp32 matmul, whose error grows with the number of terms
_COLUMNS = 512  # of one matmul: narrow enough to skip most of the upper triangle, and still fast


class Gram:
    """TᵀT of one layer: matmuls of chunks in fp32, summed in fp64; only the lower triangle is valid.

    Equal chunks in equal order give equal bits at an equal thread count, and so do sums of Grams.
    """

    def __init__(self, hidden: int) -> None:
        self.products = torch.zeros(hidden, hidden, dtype=torch.float64)  # invalid above the diagonal

    def add(self, chunk: Tensor, weights: Tensor | None = None) -> None:
        """Add rows [n, h] of any floating dtype, whose sums of squares fp32 can hold (1e-15 to 1e15).

        weights: what each row's squared error counts, fp32 [n]; None: all alike.
        """
        if weights is not None:
            chunk = chunk * weights.sqrt().unsqueeze(1)
        for rows in chunk.split(_ROWS):
            rows = rows.float()
            for first in range(0, rows.shape[1], _COLUMNS):
                last = first + _COLUMNS
                self.products[first:, first:last] += rows[:, first:].T @ rows[:, first:last]

    def __add__(self, other: "Gram") -> "Gram":
        """The Gram of both sets of rows, as a new object, since a received one may be read-only."""
        total = Gram(len(self.products))
        torch.add(self.products, other.products, out=total.products)
        return total


@dataclass(frozen=True)
class Spectrum:
    """Singular values [h], descending, and right singular vectors [h, h], one per row, of a table; fp64.

    An eigenvalue of an fp32 Gram is off by up to about 1e-7 of the largest one. A singular value is its
    root: accurate to 3 digits down to a hundredth of the largest, and noise below 3e-4 of the largest. So
    `error` is accurate to 3 digits down to 1e-2 and to 2 % at 1e-3, below the rounding error of bfloat16
    (1.7e-3). The basis is nearer to the optimum than that: noise only mixes directions of nearly equal
    singular values.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, gram: Gram) -> Self:
        """The spectrum of a table; equal bits for equal Grams. ValueError if rows were not finite."""
        # No entry of a Gram is larger than the largest of its diagonal.
        if not gram.products.diagonal().isfinite().all():
            raise ValueError("the table has NaN, infinite or huge values (above 1e15)")
        eigenvalues, columns = torch.linalg.eigh(gram.products, UPLO="L")
        values = eigenvalues.flip(0).clamp_min(0).sqrt()  # noise can make small ones negative
        vectors = columns.T.flip(0)
        # v and -v are equivalent: take the one whose largest component, the first of equals, is positive.
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        return cls(values, (vectors * largest.sign()).contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """Both tensors for a file, the vectors in fp32."""
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
        """||T - T·B·Bᵀ|| / ||T|| of the cut to `rank` (0 to h), Frobenius norms; 0 for a table of zeros."""
        lost = float(self.values[rank:].square().sum())
        return (lost / self.energy) ** 0.5 if lost else 0.0

    def basis(self, rank: int) -> Tensor:
        """Bᵀ [rank, h] with orthonormal rows, `rank` 0 to h: a row t of T is cut to (t·B)·Bᵀ."""
        return self.vectors[:rank].clone()  # pickling a view would send the whole matrix


def scaled_basis(spectrum: Spectrum, rank: int, rows: int) -> Tensor:
    """The basis [rank, h], each row scaled by the root mean square of its column of T·B over `rows` rows.

    The stored columns then have equal size, so that neighbours share a quantisation scale without loss:
    otherwise the columns of the largest singular values would set it for their whole group. No row is
    smaller than a hundredth of the first, so that float16 can hold it.
    """
    sizes = spectrum.values[:rank] / rows**0.5
    sizes = sizes.clamp_min(max(0.01 * float(sizes[0]), 1e-6))
    return spectrum.basis(rank) * sizes.unsqueeze(1).to(spectrum.vectors.dtype)
