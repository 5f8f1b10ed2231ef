"""`bench decode`: the report, its ratios, and the random tables and models it measures."""

import json
from pathlib import Path

import pytest
import torch

from mlm_train.bench import decode_models as models
from mlm_train.bench.decode import SCHEMES
from mlm_train.bench.random_table import write_random_table
from mlm_train.model.counts import count_parameters
from mlm_train.tol.serve.reader import TableReader
from mlm_train.utils.files import is_png
from tests.commands import mlm_train, refused


def test_the_report(data: Path, tmp_path: Path) -> None:
    report, plot = tmp_path / "decode.json", tmp_path / "decode.png"
    words = ("bench", "decode", "--data", data, "--shape", "tiny", "--context", 32, "--steps", 2, "--runs", 1)
    mlm_train(*words, "--batches", 1, 3, "--prefills", 8, "--skip-compile", "--json", report, "--plot", plot)
    assert is_png(plot)
    tree = json.loads(report.read_text())
    value = {row["name"]: row["median"] for row in tree["rows"]}
    ratio, batch1 = tree["ratios"], "decode.batch1."
    assert ratio["memory_over_base_time"] == value[f"{batch1}memory.bfloat16"] / value[f"{batch1}base"]
    assert ratio["memory_over_base_resident"] == value["resident.memory"] / value["resident.base"]
    hf = [value[name] for name in value if ".hf." in name]
    assert len(hf) == 2 and ratio["base_over_hf_time"] == value[f"{batch1}base"] / min(hf)
    prefill = "prefill.8.memory."
    assert ratio["prefill.8.disk_over_ram"] == value[f"{prefill}disk"] / value[f"{prefill}bfloat16"]
    # Matrices of a token at the tiny shape: attention's and the head's, and the base model's FFN.
    memory, base = 2 * 4 * 48 * 48 + 512 * 48, 2 * (4 * 48 * 48 + 3 * 48 * 128) + 512 * 48
    over = value[f"{batch1}memory.bfloat16"] / value[f"{batch1}weights.base"] * base / memory
    assert ratio["memory_over_bytes_limit"] == pytest.approx(over)
    kinds = [name for name in ratio if name.endswith("_over_bytes_limit") and not name.startswith("worst")]
    assert len(kinds) == 5 and ratio["worst_over_bytes_limit"] == max(ratio[name] for name in kinds)
    for kind in models.KINDS:
        assert value[f"resident.{kind}"] > 0


def test_refused(data: Path) -> None:
    words = ("bench", "decode", "--data", data)
    assert "--runs 0: give at least 1" in refused(*words, "--runs", 0)
    assert "1 must be among them" in refused(*words, "--batches", 8)
    assert "needs --data" in refused("bench", "decode")
    assert "at most 512" in refused(*words, "--shape", "tiny")
    assert "--context 1: give at least 2" in refused(*words, "--context", 1)


def test_the_models_have_the_papers_active_parameters() -> None:
    for kind, config in models.configs("1b", 8).items():
        matrices = models.active_bytes("1b", kind) // models.DTYPE.itemsize
        norms = 24 * (1 if kind == "memory" else 2) + 1
        counted = count_parameters(config)
        assert matrices == counted.active + counted.head - norms * config.hidden_size


@pytest.mark.parametrize("name", SCHEMES)
def test_random_tables_hold_what_was_drawn(name: str, tmp_path: Path) -> None:
    config = models.configs("tiny", 8)["memory"]
    folder = write_random_table(tmp_path / "tol", config, SCHEMES[name])
    table = TableReader.open_folder(folder, "full")
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        drawn = torch.randn(256, config.hidden_size, generator=generator)
        found = table.values(table.range(0, config.vocab_size), layer).float()
        error = (found - drawn.repeat(2, 1)).norm() / found.norm()
        assert error <= {"bfloat16": 0.002, "int8": 0.008, "int4": 0.12}[name]
