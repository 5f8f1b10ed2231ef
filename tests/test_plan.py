"""The dry run: activation estimates change in the right direction, and what cannot fit is refused."""

import re
from pathlib import Path

import pytest

from mlm_train.config import load_config
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.plan.activations import activation_bytes, in_flight
from mlm_train.plan.memory import rank_memory
from tests.commands import mlm_train, refused

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "paper" / "memory-250m.yaml"


def activations(*overrides: str, world: int = 16) -> int:
    config = load_config(CONFIG, ["train.global_batch_size=256", "train.micro_batch_size=1", *overrides])
    return activation_bytes(config, Topology.of(config.parallel, world))


def test_each_means_saves_what_it_is_for() -> None:
    tensor = "parallel.tensor=4"
    plain = activations(tensor)
    assert activations(tensor, "train.activation_checkpointing=selective") < plain
    assert activations(tensor, "train.activation_checkpointing=full") < 0.5 * plain
    assert activations(tensor, "parallel.sequence=true") < plain
    assert activations("parallel.tensor=1") > plain
    pipeline = [tensor, "parallel.pipeline=2"]
    assert activations(*pipeline, "parallel.pipeline_schedule=gpipe") > 10 * activations(*pipeline)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["parallel.pipeline_schedule=1f1b"], [4, 3, 2, 1]),
        (["parallel.pipeline_schedule=gpipe"], [64] * 4),
        (["parallel.pipeline_schedule=interleaved_1f1b", "parallel.virtual_stages=2"], [5.5, 4.5, 3.5, 2.5]),
        (["parallel.pipeline_schedule=zbv"], [4] * 4),
    ],
)
def test_micro_batches_in_flight(words: list[str], expected: list[float]) -> None:
    config = load_config(
        CONFIG, ["parallel.pipeline=4", "train.global_batch_size=256", "train.micro_batch_size=4", *words]
    )
    found = [in_flight(config, Topology.of(config.parallel, 4, rank)) for rank in range(4)]
    assert found == expected


def test_the_dry_run_says_whether_a_70b_fits(capsys: pytest.CaptureFixture[str]) -> None:
    plan = (
        "pretrain",
        CONFIG.parent.with_name("memory-70b.yaml"),
        "--dry-run",
        "--world",
        512,
        "--rank-memory",
    )
    mlm_train(*plan, 80)
    text = capsys.readouterr().out
    assert "fits in 80 GiB with" in text and "memory_scale: 1.0\n" in text
    mlm_train(*plan, 20)
    assert "without activations it fits in 20 GiB" in capsys.readouterr().out
    assert "parallel.tensor=8 on 1024 processes" in refused(*plan, 10.5)


def test_a_model_that_cannot_fit_is_one_line_with_a_layout_that_would() -> None:
    model = ("model.hidden_size=8192", "model.num_hidden_layers=80", "model.num_attention_heads=64")
    large = (*model, "model.num_key_value_heads=8", "model.intermediate_size=28672", "train.device=cpu")
    line = refused("pretrain", CONFIG.with_name("memory-1b.yaml"), *large)
    assert line.startswith("mlm-train: a rank would hold 1,") and "\n" not in line.strip()
    found = re.search(
        r"has ([\d.]+): (parallel.engine=fsdp memory.mode=table memory.placement=owned.*) on (\d+) processes",
        line,
    )
    assert found is not None, line
    words, ranks = found[2].split(), int(found[3])
    config = load_config(CONFIG.with_name("memory-1b.yaml"), [*large, *words])
    for count, fits in ((ranks, True), (ranks // 2, False)):
        memory = rank_memory(config, Topology.of(config.parallel, count))
        state = memory.weights + memory.gradients + memory.optimizer + memory.buckets
        assert (state <= float(found[1]) * 2**30 * 1.01) is fits
