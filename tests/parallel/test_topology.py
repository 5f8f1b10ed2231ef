"""The layout as arithmetic: no processes."""

from pathlib import Path

import pytest

from mlm_train.config import ParallelConfig, load_config
from mlm_train.errors import UserError
from mlm_train.parallel.topology import Topology

MICRO = Path(__file__).resolve().parents[2] / "configs" / "micro.yaml"


@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(1, 1, 1), (2, 2, 8), (4, 8, 4096), (1, 3, 12)])
def test_ranks_fill_the_grid_exactly_once(tensor: int, pipeline: int, world: int) -> None:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    ranks = [Topology.of(parallel, world, rank) for rank in range(world)]
    places = {(t.tensor_rank, t.data_rank, t.pipeline_rank) for t in ranks}
    assert len(places) == world and ranks[0].data == world // (tensor * pipeline)


def test_world_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="a multiple of 4"):
        Topology.of(ParallelConfig(tensor=2, pipeline=2), 6)


def test_batch_that_the_ranks_cannot_share() -> None:
    config = load_config(MICRO, ["train.global_batch=24", "train.micro_batch=4"])
    Topology.of(config.parallel, 3).check_batch(config)
    with pytest.raises(UserError, match="the nearest is 20") as error:
        Topology.of(config.parallel, 5).check_batch(config)
    assert "train.global_batch=24" in str(error.value)
    ramp = load_config(MICRO, ["train.ramp={start: 8, increment: 8, samples: 9}", "train.micro_batch=8"])
    with pytest.raises(UserError, match=r"train\.ramp\.start=8"):
        Topology.of(ramp.parallel, 2).check_batch(ramp)
