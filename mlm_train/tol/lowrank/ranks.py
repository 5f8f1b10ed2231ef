"""What a layer loses at every rank, in every type and group size: predicted, before any of it is stored.

What a cut to a rank loses follows from the layer's singular values, of all rows. What the codes of the
numbers that are left lose is measured on a sample of rows, as a share of each group's energy there, and that
share is taken of the energy which all rows have in the group. The basis' rounding to float16 is counted as
if its errors had no direction of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from mlm_train.tol.format.codec import grouped, rounded
from mlm_train.tol.format.schemes import Scheme
from mlm_train.tol.lowrank.spectrum import Spectrum, scaled_basis
from mlm_train.tol.serve.reader import projector

_NUMBERS = 2**19  # of a sample: all rows of a small table, 256 of hidden size 2048
_LEAST_ROWS = 128


class Sample:
    """Evenly spaced rows of a layer, and the row of its largest number, from chunks of its rows in order."""

    def __init__(self, rows: int, hidden: int) -> None:
        count = min(rows, max(_LEAST_ROWS, _NUMBERS // hidden))
        self._ids = torch.arange(count) * rows // count
        self._parts: list[Tensor] = []
        self._first, self._largest = 0, torch.zeros(1, hidden)

    def add(self, chunk: Tensor) -> None:
        """Take in the next rows [n, hidden], of any floating dtype."""
        ids = self._ids - self._first
        self._parts.append(chunk[ids[(ids >= 0) & (ids < len(chunk))]].float())
        self._first += len(chunk)
        row = int(torch.stack(chunk.aminmax(dim=1)).abs().amax(0).argmax())
        if chunk[row].abs().max() > self._largest.abs().max():
            self._largest = chunk[row : row + 1].float()

    @property
    def rows(self) -> Tensor:
        """fp32 [rows of the sample, hidden]."""
        return torch.cat(self._parts)

    @property
    def largest(self) -> Tensor:
        """fp32 [1, hidden]."""
        return self._largest


@dataclass(frozen=True)
class RankErrors:
    """A layer's spectrum, and its predicted squared relative errors, fp64 [schemes, hidden + 1].

    errors[s, r - 1]: of scheme s at rank r, 1 to hidden; the last column: of the whole layer. Infinite where
    the type cannot hold the numbers.
    """

    spectrum: Spectrum
    errors: Tensor

    @classmethod
    def of(cls, spectrum: Spectrum, sample: Sample, rows: int, schemes: Sequence[Scheme]) -> Self:
        """Of schemes without a rank, for a layer of so many rows."""
        errors = torch.zeros(len(schemes), spectrum.hidden + 1, dtype=torch.float64)
        if not schemes or not spectrum.energy:
            return cls(spectrum, errors)
        values, energies = sample.rows, spectrum.values.square()
        exact = scaled_basis(spectrum, spectrum.hidden, rows).double()
        basis = exact.half().float()
        cut, sizes = values @ projector(basis), basis.square().sum(1)
        off = (basis - exact).square().sum(1) / exact.square().sum(1)
        lost = (off * (energies + spectrum.energy / spectrum.hidden)).cumsum(0)  # at each rank
        lost[:-1] += energies.flip(0).cumsum(0).flip(0)[1:]
        ones = torch.ones_like(sizes)
        for scheme, found in zip(schemes, errors, strict=True):
            found[:-1] = (lost + _of_codes(scheme, cut, sizes, energies)) / spectrum.energy
            found[-1] = _of_whole(scheme, values, ones)
            if not rounded(scheme, sample.largest).isfinite().all():
                found[-1] = torch.inf
        return cls(spectrum, errors)

    def pack(self) -> bytes:
        """As a safetensors file."""
        return save({**self.spectrum.tensors(), "errors": self.errors})

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """What `pack` gave."""
        tensors = load(data)
        return cls(Spectrum(tensors["values"], tensors["vectors"]), tensors["errors"])


def _of_codes(scheme: Scheme, values: Tensor, sizes: Tensor, energies: Tensor) -> Tensor:
    """Squared error by their codes, fp64 [columns], of the first 1, 2, ... columns of `values` [n, columns].

    sizes: what the square of a number counts, energies: what all rows hold, of each column. A rank that does
    not fill its last group has a scale there of fewer numbers: every width of every group is tried.
    """
    spread = grouped(values, scheme.group_size or 1)
    counts, held = (grouped(each.unsqueeze(0), spread.shape[-1])[0] for each in (sizes, energies))
    lost = torch.zeros_like(held)  # [groups, width of the group - 1]
    for width in range(1, spread.shape[-1] + 1):
        part = spread[..., :width]
        error = (rounded(scheme, part.flatten(0, 1)).view_as(part) - part).square_()
        ratio = _share(error * counts[:, :width], part.square() * counts[:, :width], (0, 2))
        lost[:, width - 1] = ratio * held[:, :width].sum(1)
    before = torch.cat((lost.new_zeros(1), lost[:-1, -1].cumsum(0)))
    return (before.unsqueeze(1) + lost).flatten()[: values.shape[1]]


def _of_whole(scheme: Scheme, values: Tensor, ones: Tensor) -> Tensor:
    error = (rounded(scheme, values) - values).square_()
    return _share(error * ones, values.square(), (0, 1))


def _share(error: Tensor, energy: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Of sums in fp64; 0 of nothing, infinite where the error is not finite."""
    lost, held = (one.sum(dims, dtype=torch.float64) for one in (error, energy))
    return torch.where(held > 0, lost / held, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
