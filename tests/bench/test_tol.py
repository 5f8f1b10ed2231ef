"""`bench tol`: the report's schema and ratios on a tiny shape, what it writes, and what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch

from mlm_train.bench import tol_worker
from mlm_train.bench.tol import CHUNKS
from mlm_train.checkpoint.hf.folder import open_tensors
from mlm_train.tol.build.builder import CHUNK_ROWS
from mlm_train.tol.build.row_source import EMBEDDING
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.serve.reader import TableReader
from tests.commands import finished, refused

PROCESSES = [f"gemm.{chunk}" for chunk in CHUNKS] + ["compute"]
PARTS = ("encode", "write", "hash", "commit")


def reference(model: Path, layer: int, rows: int) -> torch.Tensor:
    """FFN-M of the first rows in float64: [rows, hidden]."""
    with open_tensors(model) as tensors:
        start = f"model.layers.{layer}.memory_"
        norm, gate, up, down = (
            tensors.tensor(f"{start}{name}.weight").double()
            for name in ("layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        )
        x0 = tensors.rows(EMBEDDING, 0, rows).double()
        eps = json.loads((model / "config.json").read_text())["rms_norm_eps"]
    x = x0 * (x0.square().mean(-1, keepdim=True) + eps).rsqrt() * norm
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_the_report_and_what_is_kept(tmp_path: Path) -> None:
    file, plot = tmp_path / "tol.json", tmp_path / "tol.png"
    folder = tmp_path / "scratch"
    folder.mkdir()
    output = finished(
        "bench", "tol", "--preset", "tiny", "--runs", 2, "--folder", folder, "--keep",
        "--json", file, "--plot", plot,
    )  # fmt: skip
    assert "fastest matmuls: gemm." in output and plot.stat().st_size > 1000
    found = json.loads(file.read_text())
    assert found.keys() == {"machine", "command", "rows", "ratios"}
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == {
        *PROCESSES, *(f"one.{name}" for name in PROCESSES), *(f"parts.{part}" for part in PARTS),
        "parts.open", "parts.run", "whole", "ray_start", "worker.private", "worker.share", "worker.resident",
        "plain.write", "tol.write",
    }  # fmt: skip
    assert all(row["min"] > 0 for row in rows.values())
    assert all(rows[name]["runs"] == 4 for name in PROCESSES)  # two turns before, two after
    assert rows["worker.private"]["runs"] in (1, 2)  # a worker may end before its first sample
    assert rows["worker.private"]["max"] < rows["worker.share"]["max"] < rows["worker.resident"]["max"]
    assert rows["whole"]["median"] == rows["parts.open"]["median"] + rows["parts.run"]["median"]
    ratios = found["ratios"]
    assert ratios.keys() == {
        "compute_over_gemm", "whole_over_gemm", "write_over_plain", "two_workers_over_gemm_scaling"
    }  # fmt: skip
    best = min(rows[f"gemm.{chunk}"]["median"] for chunk in CHUNKS)
    assert ratios["whole_over_gemm"] == pytest.approx(rows["whole"]["median"] / (2 * best))
    (kept,) = folder.iterdir()
    table = TableReader.open_folder(kept / "tol")
    for layer in (0, 1):
        values = table.values(table.range(0, 300), layer)
        assert values is not None and values.dtype == torch.bfloat16
        true = reference(kept / "model", layer, 300)
        assert true.abs().mean() > 0
        assert (values.double() - true).norm() <= 0.02 * true.norm()


def test_nothing_stays(tmp_path: Path) -> None:
    shape = ("--layers", 1, "--hidden", 64, "--ffn", 100, "--vocab", 4096)
    output = finished(
        "bench", "tol", "--preset", "tiny", *shape, "--workers", 1, "--runs", 1, "--folder", tmp_path
    )
    assert "compute_over_gemm" in output and "two_workers" not in output
    assert not list(tmp_path.iterdir())


def test_files_leave_nothing(tmp_path: Path) -> None:
    layout = Layout.of(TableSpec(), 5, 64)
    spent = tol_worker.files(tmp_path, layout, CHUNK_ROWS + 7, CHUNK_ROWS)
    assert spent.keys() == {"plain", *PARTS} and min(spent.values()) > 0
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path: Path) -> None:
    bench = ("bench", "tol", "--preset", "tiny", "--folder")
    assert "--runs 0: give at least 1" in refused(*bench, tmp_path, "--runs", 0)
    assert "--workers 0: give at least 1" in refused(*bench, tmp_path, "--workers", 0)
    assert "--layers 0: give at least 1" in refused(*bench, tmp_path, "--layers", 0)
    assert "--vocabulary 9: give at least 4096" in refused(*bench, tmp_path, "--vocabulary", 9)
    assert "--hidden 32: give a multiple of 64" in refused(*bench, tmp_path, "--hidden", 32)
    assert "--folder" in refused(*bench, tmp_path / "no")
    assert "are needed" in refused(*bench, tmp_path, "--vocabulary", 2**31)
    assert "vocab_size=1000000000000" in refused(*bench, tmp_path, "--vocabulary", 10**12)
    assert "--plot" in refused(*bench, tmp_path, "--plot", tmp_path / "no" / "tol.png")
