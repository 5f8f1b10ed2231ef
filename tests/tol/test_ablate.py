"""Ablations of tables against tables that are compressed by hand."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlm_train.analyze.ablate.compressed import Compressed
from mlm_train.data.prepared import PreparedData
from mlm_train.model.transformer import Transformer
from mlm_train.tol.serve.frequency import counts_of
from mlm_train.tol.serve.reader import TableReader
from tests.analyze.test_ablate import ablated, loss_of


def test_a_table_in_fewer_bits_and_of_lower_rank(
    tables: dict[str, Path], exported: Path, model: Transformer, data: Path, tmp_path: Path
) -> None:
    options = ("--tol", tables["float32"], "--study", "precision", "rank", "--cuts", "0.5")
    rows = ablated(exported, data, tmp_path / "ablation.json", *options)
    exact = rows["exact"]["scores"]["loss"]
    losses = {name: row["scores"]["loss"] for name, row in rows.items()}
    assert abs(losses["precision bfloat16"] - exact) < abs(losses["precision int4"] - exact) < 0.5
    sizes = [rows[f"precision {dtype}"]["bytes"] for dtype in ("bfloat16", "int8", "int4")]
    assert sizes[0] > sizes[1] > sizes[2]  # rows are padded, and these are short

    table = TableReader.open_folder(tables["float32"])
    counts = counts_of(PreparedData.open(data))
    compressed = Compressed(table, counts)
    blocks = copy.deepcopy(model).double().memory_blocks().values()
    x0 = model.embed_tokens.weight.double()
    true = [block.ffn_m(x0) for block in blocks]
    cut = {"uniform": torch.ones(601), "weighted": 1 + torch.from_numpy(np.pad(counts, (0, 89)))}
    for variant, weights in cut.items():
        roots = weights.double().sqrt()[:, None]
        directions = [torch.linalg.svd(values * roots, full_matrices=False).Vh[:16] for values in true]
        best = [values @ v.T @ v for values, v in zip(true, directions, strict=True)]
        trial, _ = compressed.cut(0.5, variant)
        read = trial.open(torch.arange(601)[None], torch.zeros(1, 601, 32))
        for layer, values in enumerate(best):
            assert (read(layer)[0] - values).norm() < 0.01 * values.norm()
        loss = loss_of(model, data, _Fixed(best))
        assert losses[f"rank 0.5 {variant}"] == pytest.approx(loss, abs=2e-2)
    trial, size = compressed.cut(0.5, "per layer")
    ranks = [scheme.rank or 32 for scheme in trial.chosen.values()]
    assert sum(ranks) == 48 and size == rows["rank 0.5 per layer"]["bytes"]
    lost = [
        [float((torch.linalg.svdvals(values)[rank:] ** 2).sum() / values.square().sum()) for rank in (r, 16)]
        for values, r in zip(true, ranks, strict=True)
    ]
    assert sum(own for own, _ in lost) <= sum(uniform for _, uniform in lost) + 1e-9


class _Fixed:
    """A source of given values, one [vocabulary, hidden] per layer."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values = values

    def open(self, ids: Tensor, x0: Tensor) -> Any:
        return lambda layer: self.values[layer][ids].to(x0.dtype)
