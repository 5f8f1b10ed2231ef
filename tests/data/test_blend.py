"""Blends of several prepared folders in fixed proportions."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mlm_train.config import DataConfig
from mlm_train.data.blend import PARTS, Blend
from mlm_train.data.prepare import prepare
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import BLOCK, Samples
from mlm_train.errors import UserError

SIZE = 64


@pytest.fixture(scope="module")
def other(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The corpus's held-out part, prepared as a source of its own with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "small"
    prepare([str(corpus / "validation.jsonl")], folder, str(model), validation_fraction=0.3)
    return PreparedData.open(folder)


def blended(*sources: tuple[PreparedData, float]) -> Blend:
    blend = [{"path": str(data.path), "weight": weight} for data, weight in sources]
    return Blend.open(DataConfig(blend=blend))


def test_samples_come_from_both_in_turn_each_shuffled_by_itself(
    prepared: PreparedData, other: PreparedData
) -> None:
    blend = blended((prepared, 0.3), (other, 0.1))
    assert blend.shares == [75_000, 25_000] and blend.names == ["data", "small"]
    samples = blend.samples("train", SIZE, 7)
    alone = [Samples(data.split("train"), SIZE, 7) for data in (prepared, other)]
    epoch = alone[1].samples_per_epoch
    count = 4 * epoch * 2 + 3  # two epochs of the small source, and some
    sources, _ = samples.locate(range(count))
    for number, one in enumerate(alone):
        mine = np.flatnonzero(sources == number)
        assert abs(len(mine) - count * (0.75, 0.25)[number]) <= 1
        assert np.array_equal(samples.windows(mine), one.windows(range(len(mine))))
    used = samples.consumed(count)
    assert [some.samples for some in used] == np.bincount(sources).tolist()
    assert used[1].tokens == used[1].samples * SIZE and used[1].epochs == pytest.approx(2, abs=2 / epoch)
    # Any batches, also across the boundaries of the blocks in which samples are located.
    ids, labels = samples.batch(BLOCK - 5, 10)
    assert np.array_equal(ids[7], samples.batch(BLOCK + 2, 1)[0][0])
    assert np.array_equal(
        labels[:3], blend.samples("train", SIZE, 7).batch_of([BLOCK - 5, BLOCK - 4, BLOCK - 3])[1]
    )


def test_validation_is_spread_over_each_source(prepared: PreparedData, other: PreparedData) -> None:
    samples = blended((prepared, 1), (other, 1)).samples("validation", SIZE, None)
    parts = [Samples(data.split("validation"), SIZE, None) for data in (prepared, other)]
    assert samples.samples_per_epoch == sum(part.samples_per_epoch for part in parts)
    ids, _ = samples.spread(range(8), 8)
    for number, part in enumerate(parts):
        expected = part.batch_of([index * part.samples_per_epoch // 4 for index in range(4)])[0]
        assert np.array_equal(ids[number::2], expected)
    assert np.array_equal(samples.spread([5, 2], 8)[0], ids[[5, 2]])


def test_fingerprint_is_of_contents_shares_and_order(prepared: PreparedData, other: PreparedData) -> None:
    found = {
        blended((prepared, 3), (other, 1)).fingerprint,
        blended((prepared, 1), (other, 3)).fingerprint,
        blended((other, 1), (prepared, 3)).fingerprint,
        prepared.fingerprint,
        other.fingerprint,
    }
    assert len(found) == 5
    assert blended((prepared, 0.75), (other, 0.25)).fingerprint in found
    assert blended((prepared, 2.0)).fingerprint == Blend.open(DataConfig(path=str(prepared.path))).fingerprint


def test_names_tell_folders_of_one_name_apart(prepared: PreparedData, tmp_path: Path) -> None:
    again = PreparedData.open(shutil.copytree(prepared.path, tmp_path / prepared.path.name))
    assert blended((prepared, 1), (again, 1)).names == [str(prepared.path), str(again.path)]


def test_weights_are_rounded_to_five_decimals(prepared: PreparedData, other: PreparedData) -> None:
    blend = blended((prepared, 1), (other, 2))
    assert blend.shares == [33_333, 66_667] and sum(blend.shares) == PARTS
    with pytest.raises(UserError, match=r"data\.blend: .* is given 2 times: give it once"):
        blended((prepared, 1), (other, 1), (prepared, 1))
    with pytest.raises(UserError, match=r"data\.blend\.1\.weight=1e-06 is less than one of 100,000"):
        blended((prepared, 1), (other, 1e-6))


def test_another_tokenizer_is_refused(
    prepared: PreparedData, texts: list[str], corpus: Path, tmp_path: Path
) -> None:
    prepare([str(corpus)], tmp_path / "strange", "train:600")
    with pytest.raises(
        UserError, match=r"strange was prepared with a different tokenizer than .*data: .*--tokenizer"
    ):
        blended((prepared, 1), (PreparedData.open(tmp_path / "strange"), 1))
