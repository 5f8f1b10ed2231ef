"""Which ranks own which layers of FFN-M: balance, and agreement between rows, weights and ids."""

import pytest
import torch

from mlm_train.parallel.ffn_m.owners import Owners, rows_of, units_of

# Ranks, for 24 layers: few, many, as many, and numbers that divide nothing.
RANKS = (1, 3, 5, 16, 24, 40, 64, 1000)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_has_the_same_part_and_every_layer_is_owned_once(ranks: int) -> None:
    owners = Owners(range(24), ranks)
    units = [0] * ranks
    for layer in owners.layers:
        shares = owners.shares(layer)
        assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
        assert shares[-1].stop == ranks
        for share in shares:
            units[share.rank] += share.stop - share.start
            assert layer in owners.held(share.rank)
    assert set(units) == {24}
    assert sum(len(owners.held(rank)) for rank in range(ranks)) == sum(
        len(owners.shares(layer)) for layer in owners.layers
    )
    assert sorted(layer for layers in owners.rounds() for layer in layers) == list(range(24))


@pytest.mark.parametrize("ranks", [3, 5, 16, 24, 40])
def test_cost_is_balanced_within_five_percent(ranks: int) -> None:
    """Rows computed for 64,000 ids, and rows of weights updated, by the busiest rank over the mean."""
    owners, ids = Owners(range(24), ranks), torch.randperm(131_072, generator=torch.manual_seed(1))[:64_000]
    units = units_of(ids, ranks)
    computed = torch.zeros(ranks)
    updated = torch.zeros(ranks)
    for layer in owners.layers:
        computed += owners.rank_of(layer, units).bincount(minlength=ranks)
        for share in owners.shares(layer):
            for rows in (4096, 22_016, 4096):  # down, gate and up, norm
                start, stop = rows_of(share, ranks, rows)
                updated[share.rank] += stop - start
    for cost in (computed, updated):
        assert cost.max() / cost.mean() <= 1.05, (ranks, cost)


def test_a_row_is_computed_by_an_owner_in_proportion_to_its_share() -> None:
    owners, ids = Owners(range(3), 5), torch.arange(100_000)
    units = units_of(ids, 5)
    for layer in owners.layers:
        counts = owners.rank_of(layer, units).bincount(minlength=5) / len(ids)
        for share in owners.shares(layer):
            assert counts[share.rank] == pytest.approx((share.stop - share.start) / 5, abs=0.01)
