"""`bench train`: compared variants agree, the report's schema and formulas; no timings are asserted."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_train.bench import train
from mlm_train.bench.train_figures import PARTS, TrainFigures, VariantFigures, disagreements, ratios_of
from mlm_train.bench.train_presets import ALL, PRESETS, Variant, flops_per_token, make_config
from mlm_train.bench.train_runners import build_runner
from mlm_train.bench.train_worker import VariantWorker
from mlm_train.model.counts import count_parameters, train_flops_per_token
from mlm_train.model.transformer import Transformer
from mlm_train.parallel import runtime
from mlm_train.train.batches import MicroBatch
from tests.commands import finished, refused

TINY = PRESETS["tiny"]
EAGER = [name for name in ALL if name != "hf.compiled"]  # compiling takes a minute


class Here(train.VariantProcess):
    """A variant in this process, so that libraries are loaded only once."""

    def __init__(self, variant: Variant, order: dict[str, Any]) -> None:
        self.variant, self.worker = variant, VariantWorker(order | {"variant": variant.name})
        self.send({"do": "build"})

    def send(self, order: dict[str, Any]) -> None:
        self.order = order

    def answer(self) -> dict[str, Any]:
        return self.worker.do(self.order)

    def end(self) -> None:
        pass

    kill = end


@pytest.fixture
def groups() -> Iterator[None]:
    """Stop the process groups of this process after the test."""
    yield
    runtime.stop()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_variants_agree_and_are_reported(
    precision: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: None
) -> None:
    monkeypatch.setattr(train, "VariantProcess", Here)
    if precision == "bf16":  # one after another, as on a GPU
        at_once = train.BenchPlan.at_once
        monkeypatch.setattr(train.BenchPlan, "at_once", lambda plan, device: at_once(plan, "cuda"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "train.json"
    assert train.bench_train(train.Options("tiny", str(data), precision, 4, EAGER, json=str(file))) == 0
    found = json.loads(file.read_text())
    assert found.keys() == {"machine", "command", "rows", "ratios", "notes"}
    rows = {row["name"]: row for row in found["rows"]}
    for name in EAGER:
        assert rows[f"tiny.{name}.speed"]["runs"] == rows[f"tiny.{name}.micro_batch"]["runs"] == 4
        assert rows[f"tiny.{name}.begin"]["runs"] == rows[f"tiny.{name}.finish"]["runs"] == 3
        assert {f"tiny.{name}.memory.{part}" for part in (*PARTS, "peak")} < rows.keys()
        parameters = rows[f"tiny.{name}.parameters"]["median"]
        parts = {part: rows[f"tiny.{name}.memory.{part}"]["median"] for part in PARTS}
        assert parts["weights"] == parts["gradients"] == 4 * parameters
        assert 2 * 4 * parameters <= parts["optimizer"] <= 2 * 4 * parameters + 1000  # and step counters
        table = TINY.layers * round(rows["tiny.distinct_of_256"]["median"] * 256) * TINY.hidden
        # Tables, in bf16 at least, and gradients; kept, the fp32 rows too.
        least = (2 + 4) * table if name.endswith((".table", ".kept")) else 0
        assert least <= parts["tables"] <= (3 if name.endswith(".kept") else 2) * least + 10_000
    assert rows["tiny.base.parameters"] | {"name": ""} == rows["tiny.hf.eager.parameters"] | {"name": ""}
    assert {"tiny.base.whole_step_deviation", "tiny.memory.table.whole_step_deviation"} < rows.keys()
    assert rows["tiny.base.whole_step"]["runs"] == 3
    assert {"tiny.memory.unique.speed_of_128", "tiny.base.speed_of_512"} < rows.keys()
    names = (
        "base_over_hf_eager memory_over_hf_eager memory_over_base memory_over_base_flop_limit "
        "memory_ffn_cost_over_limit flex3_over_base table_over_per_token_activation_memory"
    )
    sizes = [f"memory_over_base_of_{tokens}" for tokens in (128, 256, 512)]
    assert {f"tiny.{name}" for name in (*names.split(), *sizes)} < found["ratios"].keys()
    assert not any("s differ: " in note for note in found["notes"])  # losses, or gradient norms


def test_processes_a_table_and_a_plot(data: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("train.json", "train.png")}
    output = finished(
        "bench", "train", "--preset", "tiny", "--data", data, "--runs", 1, "--variants", "memory.table",
        "base", "--json", files["train.json"], "--plot", files["train.png"],
    )  # fmt: skip
    assert "training, shape tiny" in output and "tiny.memory_over_base: " in output
    assert files["train.png"].read_bytes().startswith(b"\x89PNG")
    found = json.loads(files["train.json"].read_text())
    assert found["command"].startswith("mlm-train bench train --preset tiny")
    # Memory of libraries is not counted as the model's, which is tiny.
    rows = {row["name"]: row["median"] for row in found["rows"]}
    assert (
        rows["tiny.memory.table.memory.runtime"] > 100 * 2**20 > rows["tiny.memory.table.memory.activations"]
    )


def test_noffn_is_a_base_whose_ffn_adds_nothing(groups: None) -> None:
    variants = [Variant.named(name) for name in ("noffn", "base")]
    configs = [make_config(TINY, variant, "none", "fp32", TINY.tokens) for variant in variants]
    noffn, base = (build_runner(*pair).model for pair in zip(variants, configs, strict=True))
    assert isinstance(base, Transformer) and isinstance(noffn, Transformer)
    assert not any("mlp" in name for name, _ in noffn.named_parameters())
    ids = torch.arange(TINY.sequence)[None]
    with torch.no_grad():
        assert not torch.equal(noffn(ids), base(ids))
        for name, weight in base.named_parameters():
            if "down_proj" in name:
                weight.zero_()
        assert torch.equal(noffn(ids), base(ids))


def test_the_engine_of_a_gpu_takes_the_same_step(groups: None) -> None:
    """FSDP, which needs torch alone; here on the CPU."""
    ids = torch.arange(4 * TINY.sequence).view(4, -1) % TINY.vocabulary
    batches = [MicroBatch(part, part) for part in ids.split(TINY.micro_batch)]
    variant, taken = Variant.named("memory.table"), []
    for device in ("cpu", "cuda"):
        config = make_config(TINY, variant, "none", "fp32", 4 * TINY.sequence, device)
        config = config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
        runner = build_runner(variant, config)
        loss = runner.whole(batches)
        runner.update()
        taken.append((config.parallel.engine, loss, next(runner.model.parameters()).detach().clone()))
    (zero, loss, weight), (fsdp, other_loss, other_weight) = taken
    assert (zero, fsdp, loss) == ("deepspeed", "fsdp", pytest.approx(other_loss))
    torch.testing.assert_close(weight, other_weight)


def test_shapes_have_the_same_total() -> None:
    for preset in PRESETS.values():
        totals = {}
        for name in ("base", "memory.table", "flex1.table", "flex2.table", "flex3.table"):
            config = make_config(preset, Variant.named(name), "none", "bf16", preset.tokens)
            totals[name.partition(".")[0]] = count_parameters(config.model).stored
        norms = preset.layers * preset.hidden  # of FFN-C
        assert totals["memory"] == totals["base"]
        assert totals["flex1"] == totals["flex2"] == totals["flex3"] == totals["base"] + norms


def test_flops_of_each_mode() -> None:
    distinct = {"step": 0.2, "micro": 0.3}

    def flops(name: str, recomputed: bool = True) -> float:
        variant = Variant.named(name)
        config = make_config(TINY, variant, "none", "bf16", TINY.tokens)
        return flops_per_token(variant, config, distinct, recomputed)

    memory = make_config(TINY, Variant.named("memory.table"), "none", "bf16", TINY.tokens).model
    ffn = 6 * memory.num_hidden_layers * 3 * memory.hidden_size * memory.intermediate_size
    assert flops("hf.eager") == flops("base") == flops("memory.per_token")
    assert flops("base") - flops("noffn") == pytest.approx(ffn)
    assert flops("memory.unique") - flops("noffn") == pytest.approx(0.3 * ffn)
    assert flops("memory.table") - flops("noffn") == pytest.approx(0.2 * 4 / 3 * ffn)
    assert flops("memory.kept") - flops("noffn") == pytest.approx(0.2 * ffn)
    assert flops("memory.table", recomputed=False) == train_flops_per_token(memory, TINY.sequence, 0.2)


def record(
    run: float,
    ends: float = 0.0,
    peak: int = 100,
    tables: int = 0,
    loss: float = 6.0,
    whole: Sequence[float] = (),
) -> VariantFigures:
    """Three micro-batches around `run` seconds, `ends` at begin and finish each, `whole` steps."""
    sizes = {size: [ends] * 3 for size in (128, 256)}
    return VariantFigures(
        {"runtime": 10, "weights": 20, "parameters": 5}, loss, 1.0, dict(sizes), dict(sizes),
        [run, 0.9 * run, 1.1 * run], [run] * 3, list(whole), [0.1],
        {"peak": peak, "peak_with_update": peak, "gradients": 20, "optimizer": 40, "tables": tables},
    )  # fmt: skip


def measured(records: dict[str, VariantFigures]) -> TrainFigures:
    return TrainFigures(TINY, "bf16", "none", records, 0.5, {128: 0.4, 256: 0.3}, 1e12)


def test_ratios_by_hand() -> None:
    # A step of 256 tokens has 4 micro-batches of 64: base 4 s, noffn 2 s, table 2.4 + 0.4 s.
    found = measured(
        {
            "hf.eager": record(1.25),
            "hf.compiled": record(1.1),
            "base": record(1.0, whole=(3.9, 4.0, 9.0)),
            "noffn": record(0.5),
            "memory.per_token": record(1.01, peak=140),
            "memory.table": record(0.6, ends=0.2, peak=120, tables=10, whole=(2.1, 2.0, 1.0)),
            "flex3.table": record(0.8),
        }
    )
    ratios = {name.removeprefix("tiny."): value for name, value in ratios_of(found).items()}
    assert ratios["base_over_hf_eager"] == pytest.approx(1.25)
    assert ratios["base_over_hf_compiled"] == pytest.approx(1.1)
    assert ratios["memory_over_hf_eager"] == pytest.approx(5 / 2.8)
    assert ratios["memory_over_hf_compiled"] == pytest.approx(4.4 / 2.8)
    assert ratios["memory_over_base"] == ratios["memory_over_base_of_256"] == pytest.approx(4 / 2.8)
    assert ratios["memory_over_base_of_128"] == pytest.approx(2 / 1.6)
    assert ratios["flex3_over_base"] == pytest.approx(1.25)
    assert ratios["memory_ffn_cost_over_limit"] == pytest.approx((0.8 / 2) / (4 / 3 * 0.3))
    flops = [found.flops(name, recomputed=False) for name in ("base", "memory.table")]
    assert ratios["memory_over_base_flop_limit"] == pytest.approx(4 / 2.8 / (flops[0] / flops[1]))
    assert ratios["memory_over_base_in_whole_steps"] == pytest.approx(2.0)  # of 3.9 / 2.1, 2, 9
    limit = 2.0 / (flops[0] / flops[1])
    assert ratios["memory_over_base_flop_limit_in_whole_steps"] == pytest.approx(limit)
    # Passes of one micro-batch each.
    parts = [2.4 + 0.4, 2.16 + 0.4, 2.64 + 0.4]
    around = [(parts[0] + parts[1]) / 2 / 2.1, (parts[1] + parts[2]) / 2 / 2.0, parts[2] / 1.0]
    assert found.deviations("memory.table") == pytest.approx([ratio - 1 for ratio in around])
    assert ratios["memory_over_base_by_flops_of_256"] == pytest.approx(flops[0] / flops[1])
    # Named: 10 + 20 + 20 + 40; tables count as activations where the modes are compared.
    assert ratios["table_over_per_token_activation_memory"] == pytest.approx(30 / 50)
    assert ratios["table_over_per_token_activation_memory_tables_apart"] == pytest.approx(20 / 50)


def test_a_machine_that_slows_down_leaves_ratios_as_they_are() -> None:
    found = measured({"base": record(1.0), "memory.table": record(0.5)})
    for name, run in (("base", 1.0), ("memory.table", 0.5)):
        found.records[name].run[:] = [run, 2.1 * run, 1.9 * run]
    found.records["base"].run[0] *= 3  # other load during one turn of one variant
    assert found.ratio("memory.table", "base") == pytest.approx(2.0)


def test_a_difference_is_found() -> None:
    same = {"base": record(1.0), "hf.eager": record(1.0), "memory.table": record(1.0, loss=7.0)}
    assert disagreements(measured(same)) == []
    assert "base 6" in disagreements(measured(same | {"hf.eager": record(1.0, loss=6.1)}))[0]
    assert disagreements(measured(same | {"memory.unique": record(1.0, loss=float("nan"))}))
    other = record(1.0)
    other.norm = 1.1
    assert "gradient norms differ" in disagreements(measured(same | {"hf.eager": other}))[0]


def test_bad_input(data: Path, tmp_path: Path) -> None:
    words = ("bench", "train", "--data", data, "--preset")
    assert "choose from a, b, 1b, tiny" in refused(*words, "c")
    assert "vocabulary of 512" in refused(*words, "a") and "train:32768" in refused(*words, "a")
    assert "needs --data" in refused("bench", "train")
    if not torch.cuda.is_available():
        assert "no CUDA device here; use --device cpu" in refused(*words, "tiny", "--device", "cuda")
    assert "holds no prepared data" in refused("bench", "train", "--data", tmp_path, "--preset", "tiny")
    assert "--runs 0: give at least 1" in refused(*words, "tiny", "--runs", 0)
    assert "--passes 0: give at least 1" in refused(*words, "tiny", "--passes", 0)
    assert "'memory.best' is unknown" in refused(*words, "tiny", "--variants", "memory.best")
    assert "not one of the variants" in refused(*words, "tiny", "--variants", "base", "--validate", "noffn")
    assert "multiples of a micro-batch" in refused(*words, "tiny", "--steps-of", 100)
    assert "--tokens 0: give multiples" in refused(*words, "tiny", "--tokens", 0)
    assert "prepare more text" in refused(*words, "tiny", "--steps-of", 64 * 10**7)
    for option in ("--json", "--plot"):
        assert "a folder that exists" in refused(*words, "tiny", option, tmp_path / "no" / "file")
