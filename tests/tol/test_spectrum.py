"""Spectra from chunks against the SVD of the whole table, and predicted errors against stored tables."""

import pickle

import pytest
import torch
from torch import Tensor

from mlm_train.tol.format.codec import decode, encode
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.schemes import Scheme, layout
from mlm_train.tol.lowrank.ranks import RankErrors, Sample
from mlm_train.tol.lowrank.spectrum import Gram, Spectrum, scaled_basis
from mlm_train.tol.serve.reader import projector


@pytest.fixture
def draws() -> torch.Generator:
    """A generator with a new seed in every run, which a failing test's output shows."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator


def random_table(draws: torch.Generator, values: Tensor, rows: int) -> Tensor:
    """A table fp32 [rows, h] with about these singular values [h] in random directions."""

    def directions(size: int) -> Tensor:
        random = torch.randn(size, len(values), generator=draws, dtype=torch.float64)
        return torch.linalg.qr(random).Q

    return (directions(rows) * values @ directions(len(values)).T).float()


def gram_of(table: Tensor, chunk: int = 500) -> Gram:
    gram = Gram(table.shape[1])
    for rows in table.split(chunk):
        gram.add(rows)
    return gram


def sample_of(table: Tensor, chunk: int = 500) -> Sample:
    sample = Sample(*table.shape)
    for rows in table.split(chunk):
        sample.add(rows)
    return sample


EVERY = TableSpec(dtype=None, budget=1).searched + TableSpec(dtype=None, symmetric=False, budget=1).searched


def log_values(hidden: int, last: float) -> Tensor:
    return 40 * torch.logspace(0, last, hidden, dtype=torch.float64)


# More columns than one matmul, more rows than one matmul, and fewer rows than columns.
@pytest.mark.parametrize(("rows", "hidden", "chunk"), [(900, 600, 130), (5000, 64, 5000), (40, 70, 7)])
def test_against_svd(draws: torch.Generator, rows: int, hidden: int, chunk: int) -> None:
    table = torch.randn(rows, hidden, generator=draws) @ torch.randn(hidden, hidden, generator=draws) + 3
    true = table.double()
    left, values, right = torch.linalg.svd(true, full_matrices=False)
    spectrum = Spectrum.of(gram_of(table, chunk))
    assert spectrum.values.dtype == spectrum.vectors.dtype == torch.float64
    assert spectrum.energy == pytest.approx(float(true.square().sum()), rel=1e-6)
    count = len(values)
    assert (spectrum.values[:count] - values).abs().max() <= 3e-4 * values[0]
    torch.testing.assert_close(
        spectrum.vectors @ spectrum.vectors.T, torch.eye(hidden).double(), rtol=0, atol=1e-11
    )
    for rank in (0, 1, count // 4, count // 2):
        best = left[:, rank:] * values[rank:] @ right[rank:]
        basis = spectrum.basis(rank)
        assert basis.shape == (rank, hidden)
        cut = true @ basis.T @ basis
        error = float((true - cut).norm() / true.norm())
        assert error == pytest.approx(float(best.norm() / true.norm()), rel=1e-6)
        assert spectrum.error(rank) == pytest.approx(error, rel=1e-3)
    assert spectrum.error(0) == pytest.approx(1) and spectrum.error(hidden) == 0


def test_small_singular_values(draws: torch.Generator) -> None:
    """The accuracy that the docstring of Spectrum states, down to a millionth of the largest value."""
    table = random_table(draws, log_values(128, -6), 5000)
    true = torch.linalg.svdvals(table.double())
    spectrum = Spectrum.of(gram_of(table, 5000))
    off = (spectrum.values - true).abs()
    assert off.max() <= 3e-4 * true[0]
    assert (off / true)[true >= 1e-2 * true[0]].max() <= 1e-3
    assert (off / true).max() > 1  # the smallest ones are noise
    for rank in range(128):
        best = float(true[rank:].norm() / true.norm())
        basis = spectrum.basis(rank)
        error = float((table - table.double() @ basis.T @ basis).norm() / true.norm())
        if best >= 1e-2:
            assert error == pytest.approx(best, rel=1e-6) and spectrum.error(rank) == pytest.approx(
                best, rel=1e-3
            )
        elif best >= 1e-3:
            assert error == pytest.approx(best, rel=1e-3) and spectrum.error(rank) == pytest.approx(
                best, rel=2e-2
            )


def test_equal_bits(draws: torch.Generator) -> None:
    table = torch.randn(700, 600, generator=draws)
    parts = [gram_of(part, 90) for part in table.split(250)]
    total = sum(pickle.loads(pickle.dumps(parts)), start=Gram(600))
    again = sum([gram_of(part, 90) for part in table.split(250)], start=Gram(600))
    assert torch.equal(total.products, again.products)
    one, other = Spectrum.of(total), Spectrum.of(again)
    assert torch.equal(one.values, other.values) and torch.equal(one.vectors, other.vectors)
    assert (one.values.diff() <= 0).all()
    columns = one.vectors.abs().argmax(1, keepdim=True)
    assert (one.vectors.gather(1, columns) > 0).all()


def test_sum_is_fp64(draws: torch.Generator) -> None:
    """Integers whose sums of products are exact in fp32 within a chunk, but only in fp64 over all chunks."""
    table = torch.randint(-100, 101, (20000, 70), generator=draws)
    exact = (table.T @ table).tril()
    assert exact.max() > 2**24
    gram = gram_of(table[:7000].float(), 100) + gram_of(table[7000:].float(), 100)
    assert torch.equal(gram.products.tril().long(), exact)


def test_layer_of_a_token_major_chunk(draws: torch.Generator) -> None:
    rows = torch.randn(300, 3, 50, generator=draws).bfloat16()
    spectrum, expected = (
        Spectrum.of(gram_of(rows[:, 1])),
        Spectrum.of(gram_of(rows[:, 1].float().contiguous())),
    )
    torch.testing.assert_close(spectrum.values, expected.values, rtol=1e-6, atol=0)
    basis = pickle.dumps(spectrum.basis(5))
    assert len(basis) < 50 * 50 * 8 and spectrum.basis(5).is_contiguous()


def test_table_of_zeros_and_infinite_values(draws: torch.Generator) -> None:
    zeros = Spectrum.of(gram_of(torch.zeros(20, 8)))
    assert zeros.error(0) == zeros.error(8) == 0
    assert not RankErrors.of(zeros, sample_of(torch.zeros(20, 8)), 20, EVERY).errors.any()
    for value in (float("nan"), float("inf"), 1e30):
        table = torch.randn(20, 8, generator=draws)
        table[3, 2] = value
        with pytest.raises(ValueError, match="NaN, infinite or huge"):
            Spectrum.of(gram_of(table))


def stored_error(table: Tensor, scheme: Scheme, basis: Tensor | None) -> float:
    """The squared relative error of a table after encoding and decoding."""
    values = table if basis is None else table @ projector(basis)
    rows = torch.empty(len(table), scheme.bytes(table.shape[1]), dtype=torch.uint8)
    encode(scheme, values, rows)
    found = decode(layout([scheme], table.shape[1])[0], rows, table.shape[1]).float()
    found = found if basis is None else found @ basis
    return float((found - table).double().square().sum() / table.double().square().sum())


@pytest.mark.parametrize(("rows", "hidden", "within"), [(700, 50, 0.1), (4000, 150, 0.2)])
def test_predicted_errors_are_those_of_storing(
    draws: torch.Generator, rows: int, hidden: int, within: float
) -> None:
    """Every type and group size, ranks that fill their groups and others; all rows sampled, or most.

    A fixed seed, since sums of few rounding errors vary.
    """
    draws.manual_seed(rows)
    sizes = torch.randn(rows, 1, generator=draws).exp()  # a few large rows, as real ones have
    table = random_table(draws, log_values(hidden, -1.5), rows) * sizes
    spectrum, sample = Spectrum.of(gram_of(table)), sample_of(table, 301)
    assert len(sample.rows) == min(rows, 2**19 // hidden)
    assert sample.largest.abs().max() == table.abs().max()
    predictions = RankErrors.unpack(RankErrors.of(spectrum, sample, rows, EVERY).pack())
    assert predictions.errors.shape == (len(EVERY), hidden + 1)
    whole = scaled_basis(spectrum, hidden, rows).half().float()
    for scheme, predicted in zip(EVERY, predictions.errors.tolist(), strict=True):
        for rank in (1, 7, hidden // 2, hidden):
            cut = scheme.model_copy(update={"rank": rank})
            assert stored_error(table, cut, whole[:rank]) == pytest.approx(predicted[rank - 1], rel=within), (
                cut
            )
        assert stored_error(table, scheme, None) == pytest.approx(predicted[-1], rel=within, abs=1e-15), (
            scheme
        )


def test_values_beyond_a_type(draws: torch.Generator) -> None:
    """One row of 20,000 is too large for float16, sampled or not; values of a cut have equal size."""
    table = torch.randn(20_000, 64, generator=draws)
    table[12_347] *= 1e5
    predictions = RankErrors.of(Spectrum.of(gram_of(table)), sample_of(table), 20_000, EVERY)
    for scheme, predicted in zip(EVERY, predictions.errors, strict=True):
        assert predicted[:-1].isfinite().all()
        assert predicted[-1].isfinite() == (scheme.dtype != "float16"), scheme
