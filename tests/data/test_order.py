"""Orders in closed form: permutations that look random."""

import numpy as np
import pytest

from mlm_train.data.order import Interleaving, shuffled


def epoch_of(size: int, seed: int = 7, epoch: int = 0) -> np.ndarray:
    places = np.arange(size)
    return shuffled(places, size, seed, np.full_like(places, epoch))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_every_epoch_is_a_permutation_of_its_own(size: int) -> None:
    orders = [epoch_of(size, seed, epoch) for seed in (0, 7) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(size))
    if size > 20:
        assert len({order.tobytes() for order in orders}) == 6
    assert np.array_equal(epoch_of(size), epoch_of(size))


def test_epochs_of_several_places_at_once() -> None:
    epochs, places = np.divmod(np.arange(300), 100)
    found = shuffled(places, 100, 7, epochs)
    assert np.array_equal(found, np.concatenate([epoch_of(100, epoch=epoch) for epoch in range(3)]))


def test_the_order_of_a_seed_never_changes() -> None:
    """A run must be able to resume after years: the numbers of (seed 1234, epoch 0) never change."""
    assert epoch_of(10, 1234).tolist() == [1, 3, 9, 8, 6, 4, 7, 5, 2, 0]
    far = np.array([0, 1, 5_000_000_000])
    assert shuffled(far, 6_000_000_000, 1234, np.array([0, 0, 3])).tolist() == [
        1236898950,
        5617849175,
        5927723546,
    ]


def test_orders_look_drawn() -> None:
    """Neighbours, displacement, fixed points and first elements as of random permutations."""
    size = 20_000
    order = epoch_of(size)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / np.sqrt(size)
    assert (np.abs(np.diff(order)) == 1).sum() < 15  # 2 are expected
    other = epoch_of(size, epoch=1)
    assert abs(np.corrcoef(order, other)[0, 1]) < 4 / np.sqrt(size)
    # Each window comes first equally often: chi-square of 10 cells over 2,000 epochs, 99.9 %.
    firsts = np.array([epoch_of(10, epoch=epoch)[0] for epoch in range(2000)])
    counts = np.bincount(firsts, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9
    fixed = [(epoch_of(50, epoch=epoch) == np.arange(50)).sum() for epoch in range(400)]
    assert 0.8 < np.mean(fixed) < 1.2  # 1 is expected


@pytest.mark.parametrize(
    "shares",
    [[1], [1, 1], [3, 7], [1, 99_999], [30_000, 30_000, 30_000, *[2_000] * 5], [5, 3, 2, 90], [1] * 300],
)
def test_each_source_is_within_one_sample_of_its_share_at_any_time(shares: list[int]) -> None:
    order = Interleaving(shares)
    n = min(250_000, 2 * sum(shares) + 10)
    sources, places = order.at(np.arange(n))
    for source, share in enumerate(shares):
        mine = sources == source
        assert np.array_equal(places[mine], np.arange(mine.sum()))  # each in turn, none left out
        ahead = np.cumsum(mine) - np.arange(1, n + 1) * (share / sum(shares))
        assert np.abs(ahead).max() < 1
    for stop in (0, 1, 2, n // 2, n):
        assert order.counts(stop) == np.bincount(sources[:stop], minlength=len(shares)).tolist()


def test_any_sample_is_found_without_those_before_it() -> None:
    order = Interleaving([12_345, 87_655])
    far = 10**12 + 17
    sources, places = order.at(np.array([far]))
    counts, after = order.counts(far), order.counts(far + 1)
    assert places[0] == counts[sources[0]] and after[sources[0]] == places[0] + 1
    drawn = np.random.default_rng(3).dirichlet(np.ones(9), 5)
    for weights in drawn:
        order = Interleaving(np.round(weights * 2000).astype(int).clip(1).tolist())
        counted = np.cumsum(np.eye(9, dtype=int)[order.at(np.arange(order.period))[0]], axis=0)
        expected = np.arange(1, order.period + 1)[:, None] * (order.shares / order.period)
        assert np.abs(counted - expected).max() < 1
