import numpy as np
import pytest
import torch

from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError

SIZE = 64


@pytest.fixture
def samples(prepared: PreparedData) -> Samples:
    return Samples(prepared.split("train"), SIZE, seed=7)


def test_shapes_and_next_token_labels(samples, prepared):
    ids, labels = samples.batch(3, 5)
    assert ids.shape == labels.shape == (5, SIZE)
    assert ids.dtype == labels.dtype == torch.int64
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    assert samples.samples_per_epoch == (len(prepared.split("train")) - 1) // SIZE
    windows = samples.windows(range(3, 8))
    assert np.array_equal(windows[:, :-1], ids.numpy()) and np.array_equal(windows[:, 1:], labels.numpy())


def test_any_split_into_batches_reads_the_same_samples(samples, prepared):
    first, count = samples.samples_per_epoch - 10, 24  # across an epoch
    ids, labels = samples.batch(first, count)
    for size in (1, 3, 8):
        fresh = Samples(prepared.split("train"), SIZE, seed=7)
        parts = [fresh.batch(first + i, size) for i in range(0, count, size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), ids)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
    # Ranks of a data-parallel group: each takes its own indices.
    by_rank = [samples.batch_of(range(first + rank, first + count, 2))[0] for rank in range(2)]
    assert torch.equal(torch.stack(by_rank, dim=1).flatten(0, 1), ids)
    assert torch.equal(samples.batch_of(np.array([first + 20, first]))[0], ids[[20, 0]])


def test_each_epoch_visits_every_window_once_in_its_own_order(samples, prepared):
    tokens = prepared.split("train").tokens
    n = samples.samples_per_epoch
    expected = np.lib.stride_tricks.sliding_window_view(tokens, SIZE + 1)[::SIZE]
    epochs = [samples.windows(range(e * n, (e + 1) * n)) for e in range(3)]
    for epoch in epochs:
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, expected))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert np.array_equal(samples.windows(range(n)), epochs[0])  # back to an earlier epoch
    other = Samples(prepared.split("train"), SIZE, seed=8)
    assert not np.array_equal(other.windows(range(n)), epochs[0])


def test_no_seed_is_in_order(prepared):
    samples = Samples(prepared.split("validation"), SIZE, seed=None)
    ids, labels = samples.batch(0, 4)
    tokens = np.asarray(prepared.split("validation").tokens[: 4 * SIZE + 1], dtype=np.int64)
    assert np.array_equal(ids.numpy().ravel(), tokens[:-1])
    assert np.array_equal(labels.numpy().ravel(), tokens[1:])
    assert torch.equal(samples.batch(samples.samples_per_epoch, 1)[0], ids[:1])


def test_batches_are_copies(samples):
    before = samples.batch(0, 2)[0]
    changed, _ = samples.batch(0, 2)
    changed.zero_()
    assert torch.equal(samples.batch(0, 2)[0], before)


def test_longest_sample_and_one_more(prepared):
    stream = prepared.split("validation")
    assert Samples(stream, len(stream) - 1, seed=0).samples_per_epoch == 1
    with pytest.raises(UserError, match=rf"{len(stream)} tokens.*sequence_length={len(stream)}.*lower it"):
        Samples(stream, len(stream), seed=0)
