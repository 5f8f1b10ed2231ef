"""memory.mode: what a run logs, what auto chooses, and that a resumed run keeps the choice."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mlm_train.checkpoint.folders import newest
from mlm_train.config import Config
from mlm_train.config.load import load_config
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.plan import links
from mlm_train.plan.ffn_m import (
    Distinct,
    MemoryChoice,
    Speeds,
    choose,
    distinct_ids,
    kept_bytes_per_layer,
    table_bytes,
    table_bytes_per_layer,
)
from tests.commands import ROOT, TINY, finished, refused

CONFIG = str(ROOT / "configs" / "micro.yaml")
GIB = 2.0**30
# FFN-M dominates; lookups and links cost next to nothing.
SPEEDS = Speeds(1e-4, 1e-5, 3e-4, 3e-5, 1e-8, 1e-9, 1e12, 1e12)
TEXT = Distinct(micro_batch=500, step=3000, all_ranks=4000)


def chosen(
    *words: str, world: int = 1, text: Distinct = TEXT, speeds: Speeds = SPEEDS, budget: float = GIB
) -> MemoryChoice:
    """What auto chooses for micro at 8 micro-batches of 2 x 256 tokens per rank."""
    more = (
        "train.micro_batch_size=2",
        f"train.global_batch_size={16 * world}",
        "train.precision=bf16",
        *words,
    )
    config = load_config(CONFIG, ["memory.mode=auto", *more])
    return choose(config, Topology.of(config.parallel, world), text, speeds, budget)


def mode(choice: MemoryChoice) -> tuple[str, int | None, bool]:
    """The chosen mode, table_layers and shared."""
    assert choice.config.memory is not None
    memory = choice.config.memory
    return memory.mode, memory.table_layers, memory.shared


def test_many_micro_batches_take_tables_and_a_single_one_does_not() -> None:
    assert mode(chosen()) == ("table", None, False)
    one = Distinct(500, 500, 500)  # a table would run FFN-M forward twice
    assert mode(chosen("train.global_batch_size=2", text=one)) == ("unique", None, False)


def test_an_ffn_that_costs_less_than_a_lookup_runs_at_every_position() -> None:
    cheap = SPEEDS._replace(forward_row=1e-9, pass_row=3e-9, lookup=1e-6)
    assert mode(chosen(speeds=cheap)) == ("per_token", None, False)


def test_ranks_share_their_rows_where_the_link_is_fast() -> None:
    assert mode(chosen(world=4)) == ("table", None, True)
    slow = SPEEDS._replace(data_link=1e6)
    assert mode(chosen(world=4, speeds=slow)) == ("table", None, False)
    late = SPEEDS._replace(data_latency=1.0)
    assert mode(chosen(world=4, speeds=late)) == ("table", None, False)


def test_links_are_fitted_on_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 microseconds per call and 1 GB/s; and with noise that inverts the two."""
    runtime: Any = SimpleNamespace(topology=Topology(4, 0, 2, 1), groups=SimpleNamespace(tensor=0, data=1))
    monkeypatch.setattr(links, "_mean_seconds", lambda work, count, runtime: 2e-6 + count / 1e9)
    for link in links.measure_links(runtime):
        assert link == pytest.approx((2e-6, 1e9))
    monkeypatch.setattr(links, "_mean_seconds", lambda work, count, runtime: 1.0 - count / 1e9)
    assert links.measure_links(runtime)[0].latency < 1.0 < links.measure_links(runtime)[0].bandwidth
    runtime.topology = Topology(1, 0, 1, 1)
    assert links.measure_links(runtime) == (links.Link(), links.Link())


def test_fsdp_owns_ffn_m_where_its_weights_cost_more_than_its_rows() -> None:
    link = SPEEDS._replace(data_link=1e8)
    choice = chosen("parallel.engine=fsdp", world=4, speeds=link)
    assert choice.config.memory is not None and choice.config.memory.placement == "owned"
    assert "chose table owned" in choice.reason and "table shared" in choice.reason
    assert "table owned" not in chosen("parallel.engine=deepspeed", world=4, speeds=link).reason
    slow = SPEEDS._replace(data_link=2e7)  # 3,000 rows of a layer outweigh its 200,000 weights
    other = chosen("parallel.engine=fsdp", world=4, speeds=slow)
    assert other.config.memory is not None and other.config.memory.placement is None
    assert "table owned" in other.reason


def test_what_does_not_fit_the_budget_is_computed_by_micro_batch_and_said() -> None:
    config = chosen().config
    layers = config.model.num_hidden_layers
    whole = layers * table_bytes_per_layer(config, 1.1 * TEXT.step)
    some = chosen(budget=0.5 * whole)
    assert mode(some) == ("table", layers // 2, False)
    assert "whole tables would take" in some.reason and "MiB" in some.reason
    none = chosen(budget=0.9 * whole / layers)
    assert mode(none) == ("unique", None, False) and "whole tables would take" in none.reason
    pipeline = ("parallel.pipeline=2", "parallel.pipeline_schedule=zbv", "train.micro_batch_size=1")
    half = chosen(*pipeline, world=2, budget=0.3 * whole)  # no layers without a table under zero-bubble
    assert mode(half)[0] != "table"


def test_what_the_tables_leave_of_the_budget_keeps_activations() -> None:
    choice = chosen()
    config, alone = choice.config, Topology(1, 0, 1, 1)
    layers = config.model.num_hidden_layers
    assert config.memory is not None and config.memory.kept_layers == layers
    assert f"table (kept_layers={layers})" in choice.reason
    tables, kept = table_bytes_per_layer(config, TEXT.step), kept_bytes_per_layer(config, TEXT.step)
    assert table_bytes(config, alone, TEXT) == pytest.approx(layers * (tables + kept))
    some = chosen(budget=1.1 * (layers * tables + 1.5 * kept)).config.memory
    assert some is not None and (some.mode, some.kept_layers) == ("table", 1)
    again = chosen("train.activation_checkpointing=full").config.memory
    assert again is not None and (again.mode, again.kept_layers) == ("table", None)
    shared = chosen(world=4).config  # a rank computes a quarter of all ranks' rows
    assert table_bytes(shared, Topology(4, 0, 1, 1), TEXT) == pytest.approx(layers * (tables + kept / 3))


def test_zero_3_has_no_tables() -> None:
    assert mode(chosen("parallel.zero_stage=3", world=2)) == ("unique", None, False)


@pytest.mark.parametrize(("tokens", "vocabulary", "ratio"), [(2048, 2**15, 0.25), (2**18, 2**17, 0.08)])
def test_expected_ids_of_text(tokens: int, vocabulary: int, ratio: float) -> None:
    assert distinct_ids(tokens, vocabulary) == pytest.approx(ratio * tokens)
    assert distinct_ids(2**22, 5000) <= 5000


def test_a_run_decides_says_so_and_keeps_it(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        CONFIG,
        *TINY,
        f"data.path={data}",
        f"train.output={run}",
        "train.steps=4",
        "checkpoint.interval=2",
    ]
    first = finished("launch", "--nproc", 2, *words, "train.stop_after=2")
    assert "memory.mode=auto chose " in first and "distinct ids per micro-batch" in first
    decided = _saved(run)
    assert decided.memory is not None and decided.memory.mode != "auto"
    assert yaml.safe_load((run / "config.yaml").read_text())["memory"]["mode"] == "auto"
    again = finished("launch", "--nproc", 2, *words)
    assert f"memory.mode=auto keeps the checkpoint's {decided.memory.mode}" in again
    assert _saved(run).memory == decided.memory
    other = finished("pretrain", *words, "train.steps=5", "schedule.total_steps=4", "memory.mode=table")
    assert "memory.mode=table: about" in other and "MiB per rank" in other
    assert "memory.mode" in other


def _saved(run: Path) -> Config:
    from mlm_train.checkpoint.load import config_of, open_checkpoint

    folder = newest(run / "checkpoints")
    assert folder is not None
    return config_of(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("memory.mode=table", "parallel.zero_stage=3"), "is incompatible with parallel.zero_stage=3"),
        (("memory.mode=table", "parallel.pipeline=2", "parallel.x0_transport=relay"), "use broadcast"),
        (
            (
                "memory.mode=table",
                "memory.table_layers=1",
                "parallel.pipeline=2",
                "parallel.pipeline_schedule=zbv",
            ),
            "is incompatible with parallel.pipeline_schedule=zbv",
        ),
        (("memory.mode=unique", "memory.budget_gib=1"), "has an effect only with memory.mode=auto"),
        (("memory.budget_gib=0",), "greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], message: str) -> None:
    line = refused("pretrain", CONFIG, *words, "--dry-run", "--world", 2)
    assert message in line
