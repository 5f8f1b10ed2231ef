"""Edge cases of the learning rate and of batch size warmup."""

from pathlib import Path

import pytest

from mlm_train.config import Config, load_config
from mlm_train.train.schedule import global_batch_at, learning_rate

MICRO = Path(__file__).resolve().parents[2] / "configs" / "micro.yaml"


def config(*overrides: str) -> Config:
    base = ["optimizer.lr=1.0", "schedule.min_lr=0.1", "schedule.warmup_steps=10", "train.steps=110"]
    base.append("train.global_batch_size=32")
    return load_config(MICRO, [*base, *overrides])


def test_cosine() -> None:
    c = config()
    assert learning_rate(c, 0) == pytest.approx(0.1)
    assert learning_rate(c, 9) == pytest.approx(1.0)
    assert learning_rate(c, 60) == pytest.approx(0.55)
    assert learning_rate(c, 110) == pytest.approx(0.1)
    rates = [learning_rate(c, step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_warmup_stable_decay() -> None:
    c = config("schedule.kind=wsd", "schedule.decay_steps=20")
    assert learning_rate(c, 4) == pytest.approx(0.5)
    assert {learning_rate(c, step) for step in range(10, 91)} == {1.0}
    assert learning_rate(c, 100) == pytest.approx(0.55)
    assert learning_rate(c, 110) == pytest.approx(0.1)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(config("schedule.warmup_steps=0"), 0) == pytest.approx(1.0)


def test_batch_size_warmup_takes_equally_many_samples_at_each_size() -> None:
    c = config("train.batch_size_warmup={start: 8, increment: 8, samples: 96}").train
    sizes, samples = [], 0
    while samples < 200:
        sizes.append(global_batch_at(c, samples))
        samples += sizes[-1]
    assert sizes == [8, 8, 8, 8, 16, 16, 24, 24, 32, 32, 32]
    assert global_batch_at(config().train, 0) == 32
