"""Predicted error of a layer at every rank, in every type and group size, before it is stored.

The error of a cut to a rank follows from the layer's singular values over all rows. The quantisation error
of the remaining values is measured on a sample of rows, as a fraction of each group's energy there, and
scaled to the energy of all rows in the group. The rounding errors of the basis to float16 are taken to be
isotropic.
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

_SAMPLE_VALUES = 2**19  # all rows of a small table, 256 of hidden size 2048
_MIN_ROWS = 128


class Sample:
    """Evenly spaced rows of a layer, and the row of its largest value, from chunks of its rows in order."""

    def __init__(self, rows: int, hidden: int) -> None:
        count = min(rows, max(_MIN_ROWS, _SAMPLE_VALUES // hidden))
        self._ids = torch.arange(count) * rows // count
        self._parts: list[Tensor] = []
        self._first, self._largest = 0, torch.zeros(1, hidden)

    def add(self, chunk: Tensor) -> None:
        """Add the next rows [n, hidden], of any floating dtype."""
        ids = self._ids - self._first
        self._parts.append(chunk[ids[(ids >= 0) & (ids < len(chunk))]].float())
        self._first += len(chunk)
        row = int(torch.stack(chunk.aminmax(dim=1)).abs().amax(0).argmax())
        if chunk[row].abs().max() > self._largest.abs().max():
            self._largest = chunk[row : row + 1].float()

    @property
    def rows(self) -> Tensor:
        """The sampled rows: fp32 [n, hidden]."""
        return torch.cat(self._parts)

    @property
    def largest(self) -> Tensor:
        """The row with the largest absolute value: fp32 [1, hidden]."""
        return self._largest


@dataclass(frozen=True)
class RankErrors:
    """A layer's spectrum, and its predicted squared relative errors, fp64 [schemes, hidden + 1].

    errors[s, r - 1]: of scheme s at rank r, 1 to hidden; last column: of the uncut layer. Infinite where the
    type cannot hold the values.
    """

    spectrum: Spectrum
    errors: Tensor

    @classmethod
    def of(cls, spectrum: Spectrum, sample: Sample, rows: int, schemes: Sequence[Scheme]) -> Self:
        """Predict the errors of schemes without a rank, for a layer of `rows` rows."""
        errors = torch.zeros(len(schemes), spectrum.hidden + 1, dtype=torch.float64)
        if not schemes or not spectrum.energy:
            return cls(spectrum, errors)
        values, energies = sample.rows, spectrum.values.square()
        exact = scaled_basis(spectrum, spectrum.hidden, rows).double()
        basis = exact.half().float()
        cut, sizes = values @ projector(basis), basis.square().sum(1)
        basis_error = (basis - exact).square().sum(1) / exact.square().sum(1)
        lost = (basis_error * (energies + spectrum.energy / spectrum.hidden)).cumsum(0)  # at each rank
        lost[:-1] += energies.flip(0).cumsum(0).flip(0)[1:]
        for scheme, row in zip(schemes, errors, strict=True):
            row[:-1] = (lost + _quantisation_error(scheme, cut, sizes, energies)) / spectrum.energy
            row[-1] = _uncut_error(scheme, values)
            if not rounded(scheme, sample.largest).isfinite().all():
                row[-1] = torch.inf
        return cls(spectrum, errors)

    def pack(self) -> bytes:
        """Serialise as a safetensors file."""
        return save({**self.spectrum.tensors(), "errors": self.errors})

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read the bytes that `pack` returned; KeyError if they hold no errors."""
        tensors = load(data)
        return cls(Spectrum(tensors["values"], tensors["vectors"]), tensors["errors"])


def _quantisation_error(scheme: Scheme, values: Tensor, sizes: Tensor, energies: Tensor) -> Tensor:
    """Squared quantisation error, fp64 [columns], of the first 1, 2, ... columns of `values` [n, columns].

    sizes: weight of a squared value of each column; energies: of each column over all rows. A rank that does
    not fill its last group has a scale of fewer values there: every width of every group is measured.
    """
    spread = grouped(values, scheme.group_size or 1)
    weights, total = (grouped(each.unsqueeze(0), spread.shape[-1])[0] for each in (sizes, energies))
    lost = torch.zeros_like(total)  # [groups, width of the group - 1]
    for width in range(1, spread.shape[-1] + 1):
        part = spread[..., :width]
        error = (rounded(scheme, part.flatten(0, 1)).view_as(part) - part).square_()
        ratio = _ratio(error * weights[:, :width], part.square() * weights[:, :width], (0, 2))
        lost[:, width - 1] = ratio * total[:, :width].sum(1)
    before = torch.cat((lost.new_zeros(1), lost[:-1, -1].cumsum(0)))
    return (before.unsqueeze(1) + lost).flatten()[: values.shape[1]]


def _uncut_error(scheme: Scheme, values: Tensor) -> Tensor:
    error = (rounded(scheme, values) - values).square_()
    return _ratio(error, values.square(), (0, 1))


def _ratio(error: Tensor, energy: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum of error over sum of energy, in fp64; 0 for zero energy, infinite for a non-finite error."""
    lost, total = (values.sum(dims, dtype=torch.float64) for values in (error, energy))
    return torch.where(total > 0, lost / total, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
