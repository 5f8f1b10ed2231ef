"""Fixtures of the training tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlm_train.parallel import runtime
from tests.commands import mlm_train
from tests.train.short_runs import pretrain


@pytest.fixture
def no_groups_left() -> Iterator[None]:
    """Destroy process groups that a rejected run in this process left."""
    yield
    runtime.stop()


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with two checkpoints."""
    run = tmp_path_factory.mktemp("trained") / "run"
    mlm_train(*pretrain(data, run, "checkpoint.interval=1"))
    runtime.stop()
    return run
