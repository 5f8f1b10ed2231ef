"""The layout of ranks, without processes."""

import re
from pathlib import Path

import pytest

from mlm_train.config import ParallelConfig, load_config
from mlm_train.errors import UserError
from mlm_train.parallel.mesh.groups import ranks_along
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.stages import balanced, my_spans

MICRO = Path(__file__).resolve().parents[2] / "configs" / "micro.yaml"


@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(1, 1, 1), (2, 2, 8), (4, 8, 4096), (1, 3, 12)])
def test_ranks_fill_the_grid_exactly_once(tensor: int, pipeline: int, world: int) -> None:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    ranks = [Topology.of(parallel, world, rank) for rank in range(world)]
    positions = {(t.tensor_rank, t.data_rank, t.pipeline_rank) for t in ranks}
    assert len(positions) == world and ranks[0].data == world // (tensor * pipeline)


def test_every_world_size_to_4096_is_accepted_or_refused() -> None:
    for world in range(1, 4097):
        for tensor, pipeline in ((1, 1), (2, 4), (8, 2), (3, 5)):
            parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
            if world % (tensor * pipeline):
                with pytest.raises(UserError, match="start"):
                    Topology.of(parallel, world)
            else:
                last = Topology.of(parallel, world, world - 1)
                assert (last.tensor_rank, last.pipeline_rank) == (tensor - 1, pipeline - 1)
                assert last.data_rank == last.data - 1


def test_groups_are_those_of_megatron(tmp_path: Path) -> None:
    """Our ranks along each axis are those of megatron-core's own generator."""
    from megatron.core.parallel_state import RankGenerator

    ours = [Topology.of(ParallelConfig(tensor=2, pipeline=4), 32, rank) for rank in range(32)]
    theirs = RankGenerator(tp=2, ep=1, dp=4, pp=4, cp=1, order="tp-cp-ep-dp-pp")
    created = ranks_along(32, 2, 4)
    axes = {"tp": "tensor", "dp": "data", "pp": "pipeline", "tp-pp": "model", "tp-dp": "stage"}
    for axis, name in axes.items():
        assert sorted(created[name]) == sorted(theirs.get_ranks(axis))
    assert created["embedding"] == [[ranks[0], ranks[-1]] for ranks in created["pipeline"]]
    for axis, field in (("tp", "tensor_rank"), ("dp", "data_rank"), ("pp", "pipeline_rank")):
        for group in theirs.get_ranks(axis):
            assert [getattr(ours[rank], field) for rank in group] == list(range(len(group)))


def test_no_rank_imports_megatron() -> None:
    """It takes seconds; the data commands alone use it."""
    package = MICRO.parents[1] / "mlm_train"
    users = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if re.search(r"^\s*(from|import) megatron", file.read_text(), re.MULTILINE)
    }
    assert users == {"bench/data.py", "data/prepare.py"}


PIPELINE = ["parallel.pipeline=2", "train.micro_batch_size=1"]
INTERLEAVED = ["parallel.pipeline_schedule=interleaved_1f1b", "parallel.virtual_stages=2"]
RAMP = "train.batch_size_warmup={start: 2, increment: 2, samples: 64}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*PIPELINE, "train.global_batch_size=1"],
            "1f1b cannot run with parallel.pipeline=2; the nearest batch size it can run is 2",
        ),
        (
            [
                *PIPELINE,
                "parallel.pipeline_schedule=interleaved_1f1b",
                "parallel.virtual_stages=2",
                "train.global_batch_size=5",
            ],
            "5 micro-batches, which parallel.pipeline_schedule=interleaved_1f1b cannot run",
        ),
        (
            [*PIPELINE, "parallel.pipeline_schedule=dualpipe_v", "train.global_batch_size=3"],
            "3 micro-batches, which parallel.pipeline_schedule=dualpipe_v cannot run with "
            "parallel.pipeline=2; the nearest batch size it can run is 4",
        ),
        (
            [
                "parallel.pipeline=4",
                "train.micro_batch_size=1",
                "train.batch_size_warmup={start: 2, increment: 2, samples: 64}",
            ],
            "train.batch_size_warmup=2: gives 2 micro-batches",
        ),
    ],
)
def test_micro_batch_counts_that_a_schedule_cannot_run(overrides: list[str], message: str) -> None:
    config = load_config(MICRO, overrides)
    with pytest.raises(UserError) as error:
        Topology.of(config.parallel, config.parallel.pipeline).check_batch(config)
    assert message in str(error.value)


def test_stages_are_balanced_with_the_head_counted() -> None:
    model = load_config(MICRO, ["model.num_hidden_layers=8"]).model
    for stages in range(1, 9):
        sizes = balanced(model, stages)
        assert len(sizes) == stages and sum(sizes) == 8 and min(sizes) >= 1
    assert balanced(model, 1) == [8]
    # A vocabulary so large that the head costs as much as six layers leaves the last stage one layer.
    layer = 4 * 192 * 192 + 3 * 192 * 512
    heavy = load_config(MICRO, ["model.num_hidden_layers=8", f"model.vocab_size={6 * layer // 192}"]).model
    assert balanced(heavy, 2) == [7, 1]


def test_a_v_goes_down_the_ranks_and_up_again() -> None:
    config = load_config(MICRO, [*PIPELINE, "parallel.pipeline_schedule=zbv", "model.num_hidden_layers=8"])
    spans = [my_spans(config, Topology.of(config.parallel, 2, rank)) for rank in range(2)]
    assert [[span.number for span in of_rank] for of_rank in spans] == [[0, 3], [1, 2]]
    assert spans[0][0].first and spans[0][1].last


def test_world_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="start 4 or 8"):
        Topology.of(ParallelConfig(tensor=2, pipeline=2), 6)


def test_batch_that_the_ranks_cannot_split_evenly() -> None:
    config = load_config(MICRO, ["train.global_batch_size=24", "train.micro_batch_size=4"])
    Topology.of(config.parallel, 3).check_batch(config)
    with pytest.raises(UserError, match="the nearest is 20") as error:
        Topology.of(config.parallel, 5).check_batch(config)
    assert "train.global_batch_size=24" in str(error.value)
    ramp = load_config(
        MICRO, ["train.batch_size_warmup={start: 8, increment: 8, samples: 9}", "train.micro_batch_size=8"]
    )
    with pytest.raises(UserError, match=r"train\.batch_size_warmup\.start=8"):
        Topology.of(ramp.parallel, 2).check_batch(ramp)
