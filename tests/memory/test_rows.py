"""Sums into rows, and deterministic training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlm_train.memory.rows import add_rows
from tests.commands import TINY, finished, scalars
from tests.ranks import train_on_ranks
from tests.zero_bubble import runs_here, skip_the_rest


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_sorted_segments_equal_the_plain_sum(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    index = torch.randint(0, rows, (500,), generator=generator)
    index[index == 3] = 0  # a row that no index selects
    values = torch.randn(500, 16, generator=generator)
    start = torch.randn(rows, 16, generator=generator)
    plain, sorted_ = start.clone(), start.clone()
    add_rows(plain, index, values)
    torch.use_deterministic_algorithms(True)
    try:
        add_rows(sorted_, index, values.bfloat16().float())
        again = start.clone()
        add_rows(again, index, values.bfloat16())
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(sorted_, again, rtol=0, atol=0)
    exact = start.double().index_add(0, index, values.double())
    torch.testing.assert_close(plain.double(), exact, rtol=1e-5, atol=1e-5)
    exact = start.double().index_add(0, index, values.bfloat16().double())
    torch.testing.assert_close(sorted_.double(), exact, rtol=1e-5, atol=1e-5)


UNIQUE, TABLE = "memory.mode=unique", "memory.mode=table"
LAYOUTS = {
    "DP2, recomputed": (
        2, ("train.precision=bf16", "train.activation_checkpointing=full", "train.deterministic=true", UNIQUE)
    ),
    "DP2, shared tables": (
        2, ("train.precision=bf16", "train.deterministic=true", TABLE, "memory.placement=shared")
    ),
    "TP2 SP x PP2, ZeRO-2": (
        4,
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "train.micro_batch_size=1",
         "parallel.zero_stage=2", TABLE),
    ),
    "PP2 zbv": (
        2, ("parallel.pipeline=2", "parallel.pipeline_schedule=zbv", "train.micro_batch_size=1", TABLE)
    ),
    "PP2": (2, ("parallel.pipeline=2", "train.micro_batch_size=1", "train.deterministic=true", UNIQUE)),
}  # fmt: skip


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.long) if name.startswith("PP2") else name for name in LAYOUTS],
)
def test_two_runs_are_equal_to_the_bit(layout: str, data: Path, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    if not all(map(runs_here, overrides)):
        skip_the_rest(layout)
    runs = []
    for number in range(2):
        run = tmp_path / str(number)
        training = (
            "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}", "train.steps=3",
            "train.eval_interval=0", "checkpoint.interval=0", "model.num_hidden_layers=4", *overrides,
        )  # fmt: skip
        # Once from the start of Python on, whose hashes differ from process to process.
        train_on_ranks(world, *training) if number else finished("launch", "--nproc", world, *training)
        tensors = {}
        for path in sorted(run.glob("checkpoints/step-*/*.safetensors")):
            tensors |= {(path.name, name): value for name, value in load_file(path).items()}
        runs.append((scalars(run, "train/loss"), scalars(run, "train/grad_norm"), tensors))
    (*curves, weights), (*other_curves, other_weights) = runs
    assert curves == other_curves and weights and weights.keys() == other_weights.keys()
    different = [name for name, value in weights.items() if not value.equal(other_weights[name])]
    assert different == []
