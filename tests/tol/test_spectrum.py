"""Spectra from chunks against the SVD of the whole table, and ranks against every other choice."""

import itertools
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mlm_train.tol.ranks import break_even_rank, choose_ranks, uniform_rank
from mlm_train.tol.spectrum import Gram, Spectrum


@pytest.fixture
def draws() -> torch.Generator:
    """Other numbers in every run; the seed is in the failing test's output."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator


def random_table(draws: torch.Generator, values: Tensor, rows: int) -> Tensor:
    """A table fp32 [rows, h] of about these singular values [h], and random directions."""

    def directions(size: int) -> Tensor:
        random = torch.randn(size, len(values), generator=draws, dtype=torch.float64)
        return torch.linalg.qr(random).Q

    return (directions(rows) * values @ directions(len(values)).T).float()


def gram_of(table: Tensor, chunk: int = 500) -> Gram:
    gram = Gram(table.shape[1])
    for rows in table.split(chunk):
        gram.add(rows)
    return gram


def log_values(hidden: int, last: float) -> Tensor:
    return 40 * torch.logspace(0, last, hidden, dtype=torch.float64)


# More columns than one product has, more rows than one product has, and fewer rows than columns.
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
    """What the docstring of Spectrum says of an fp32 Gram, down to a millionth of the largest value."""
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
    whole = sum(pickle.loads(pickle.dumps(parts)), start=Gram(600))
    again = sum([gram_of(part, 90) for part in table.split(250)], start=Gram(600))
    assert torch.equal(whole.products, again.products)
    one, other = Spectrum.of(whole), Spectrum.of(again)
    assert torch.equal(one.values, other.values) and torch.equal(one.vectors, other.vectors)
    assert (one.values.diff() <= 0).all()
    columns = one.vectors.abs().argmax(1, keepdim=True)
    assert (one.vectors.gather(1, columns) > 0).all()


def test_sum_is_fp64(draws: torch.Generator) -> None:
    """Whole numbers, whose products fp32 holds exactly within a chunk and only fp64 over all of them."""
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
    zeros, some = Spectrum.of(gram_of(torch.zeros(20, 8))), random_spectrum(draws, 8, -1)
    assert zeros.error(0) == zeros.error(8) == 0
    assert choose_ranks([zeros, some], 1000, 1) == [0, 8]
    for value in (float("nan"), float("inf"), 1e30):
        table = torch.randn(20, 8, generator=draws)
        table[3, 2] = value
        with pytest.raises(ValueError, match="NaN, infinite or huge"):
            Spectrum.of(gram_of(table))


def random_spectrum(draws: torch.Generator, hidden: int, last: float) -> Spectrum:
    """Random values around a decay from 1 to 10^last, of any scale."""
    values = log_values(hidden, last) * (1 + torch.rand(hidden, generator=draws, dtype=torch.float64))
    scale = 10 ** float(torch.randn(1, generator=draws))
    return Spectrum(values.sort(descending=True).values * scale, torch.eye(hidden).double())


def total_error(spectra: Sequence[Spectrum], ranks: Sequence[int], weights: Sequence[float]) -> float:
    pairs = zip(spectra, ranks, weights, strict=True)
    return sum(weight * spectrum.error(rank) ** 2 for spectrum, rank, weight in pairs)


def cheapest(
    spectra: Sequence[Spectrum], budget: float, costs: Sequence[float], weights: Sequence[float], step: int
) -> float:
    """The least total error of all choices within the budget."""
    choices = [sorted({*range(0, spectrum.hidden, step), spectrum.hidden}) for spectrum in spectra]
    return min(
        total_error(spectra, ranks, weights)
        for ranks in itertools.product(*choices)
        if sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= budget
    )


@pytest.mark.parametrize(("hidden", "step"), [(8, 1), (12, 3), (8, 8)])
@pytest.mark.parametrize("weighted", [False, True])
def test_ranks_are_the_best(draws: torch.Generator, hidden: int, step: int, weighted: bool) -> None:
    for trial in range(20):
        spectra = [random_spectrum(draws, hidden, last) for last in (-0.2, -1, -2.5)]
        weights = (0.1 + torch.rand(3, generator=draws)).tolist() if weighted else None
        budget = 7 * (trial * 3 * hidden / 20 + 0.5)
        ranks = choose_ranks(spectra, budget, 7, weights, step)
        assert 7 * sum(ranks) <= budget and all(rank % step == 0 for rank in ranks)
        ones = weights or [1.0] * 3
        best = cheapest(spectra, budget, [7] * 3, ones, step)
        assert total_error(spectra, ranks, ones) == pytest.approx(best, rel=1e-9)


def test_ranks_of_unequal_costs(draws: torch.Generator) -> None:
    """Costs that differ, a step that leaves a short last block: less than one block from the best."""
    for trial in range(100):
        spectra = [random_spectrum(draws, hidden, last) for hidden, last in ((7, -0.2), (7, -0.5), (8, -1))]
        costs = (10 ** torch.rand(3, generator=draws)).tolist()
        budget = sum(8 * cost for cost in costs) * (trial + 1) / 100
        ranks = choose_ranks(spectra, budget, costs, step=3)
        left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
        assert left >= 0
        lost = 0.0
        for spectrum, rank, cost in zip(spectra, ranks, costs, strict=True):
            assert rank % 3 == 0 or rank == spectrum.hidden
            after = min(rank + 3, spectrum.hidden)
            assert rank == after or (after - rank) * cost > left
            lost = max(lost, spectrum.error(rank) ** 2 - spectrum.error(after) ** 2)
        error, best = total_error(spectra, ranks, [1] * 3), cheapest(spectra, budget, costs, [1] * 3, 3)
        assert best * (1 - 1e-9) <= error <= best * (1 + 1e-9) + lost
    assert ranks == [7, 7, 8]


def test_gain_is_counted_a_byte() -> None:
    def flat(hidden: int) -> Spectrum:
        return Spectrum(torch.full((hidden,), 0.3, dtype=torch.float64), torch.eye(hidden).double())

    assert choose_ranks([flat(2), flat(2)], 3, [3, 1]) == [0, 2]
    # After 3 of layer 0's 4 ranks: its last one gains 0.25 for 3 bytes, 3 ranks of layer 1 gain 0.24.
    assert choose_ranks([flat(4), flat(6)], 12, [3, 1], [1, 0.48], step=3) == [4, 0]


def test_unequal_ranks_beat_equal_ones(draws: torch.Generator) -> None:
    """On tables, with the errors of their true cuts."""
    tables = [random_table(draws, log_values(48, last), 400) for last in (-0.1, -1, -3)]
    spectra = [Spectrum.of(gram_of(table)) for table in tables]

    def cut_error(ranks: Sequence[int]) -> float:
        total = 0.0
        for table, spectrum, rank in zip(tables, spectra, ranks, strict=True):
            basis, true = spectrum.basis(rank), table.double()
            total += float((true - true @ basis.T @ basis).norm() / true.norm()) ** 2
        return total

    budget = 3 * 16 * (400 * 2 + 48 * 2)
    rank = uniform_rank(3, budget, 400 * 2 + 48 * 2, hidden=48)
    ranks = choose_ranks(spectra, budget, 400 * 2 + 48 * 2)
    assert rank == 16 and sum(ranks) == 48
    assert ranks[0] > ranks[1] > ranks[2] > 0
    assert cut_error(ranks) < 0.9 * cut_error([rank] * 3)


def test_equal_layers_have_equal_ranks(draws: torch.Generator) -> None:
    spectrum = random_spectrum(draws, 32, -2)
    flat = Spectrum(torch.full((32,), 0.7, dtype=torch.float64), spectrum.vectors)
    for layer, step in itertools.product((spectrum, flat), (1, 4)):
        budget = 5 * 11 * 12 + 11 * step // 2
        assert (
            choose_ranks([layer] * 5, budget, 11, step=step)
            == [uniform_rank(5, budget, 11, step, hidden=32)] * 5
        )
    # Errors are relative unless the layers' energies are given as weights.
    large = Spectrum(spectrum.values * 100, spectrum.vectors)
    assert choose_ranks([spectrum, large], 20, 1) == [10, 10]
    energies = [spectrum.energy, large.energy]
    assert choose_ranks([spectrum, large], 20, 1, energies)[1] == 20
    assert choose_ranks([spectrum, large], 20, 1, [1, 0]) == [20, 0]


def test_uniform_rank() -> None:
    assert uniform_rank(3, 3 * 10 * 20, 20, hidden=64) == 10
    assert uniform_rank(3, 3 * 10 * 20 - 1, 20, hidden=64) == 9
    assert uniform_rank(3, 3 * 10 * 20, 20, 4, hidden=64) == 8
    assert uniform_rank(2, 10 * 20 + 10 * 30, [20, 30], hidden=64) == 10
    assert uniform_rank(3, 10**6, 20, 24, hidden=64) == 64
    assert uniform_rank(3, 19, 20, hidden=64) == uniform_rank(3, -1000, 20, hidden=64) == 0


def test_break_even_rank() -> None:
    # 128256 * 2048 / (128256 + 2048) = 2015.8
    assert break_even_rank(128256, 2048) == break_even_rank(128256, 2048, 2, 2, 2) == 2016
    assert break_even_rank(20, 20) == 10
    for rows, hidden, table, u, basis in (
        (1000, 64, 2, 2, 4),
        (1000, 64, 1.03125, 0.53125, 2),
        (50, 64, 2, 4, 2),
    ):
        rank = break_even_rank(rows, hidden, table, u, basis)
        plain = rows * hidden * table
        assert rank * (rows * u + hidden * basis) >= plain > (rank - 1) * (rows * u + hidden * basis)
    assert break_even_rank(128256, 2048, 2, 1.03125, 2) > 2048


def test_bad_arguments(draws: torch.Generator) -> None:
    spectra = [random_spectrum(draws, 8, -1)] * 2
    for fields in ({"step": 0}, {"bytes_per_rank": 0}, {"weights": [1, -1]}):
        with pytest.raises(ValueError, match="must be positive"):
            choose_ranks(spectra, **{"budget": 10, "bytes_per_rank": 1, **fields})
    for fields in ({"bytes_per_rank": [1]}, {"weights": [1, 1, 1]}):
        with pytest.raises(ValueError, match="values for 2 layers"):
            choose_ranks(spectra, **{"budget": 10, "bytes_per_rank": 1, **fields})
