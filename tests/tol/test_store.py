"""A table as a memory source: a model that looks FFN-M up equals one that computes it."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.errors import UserError
from mlm_train.memory import make_source
from mlm_train.model.transformer import Transformer
from mlm_train.tol.format.index import INDEX
from mlm_train.tol.format.index_file import read_index, write_index
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.serve.source import TolSource
from mlm_train.tol.serve.store import StoreOptions, Tier
from mlm_train.tol.storage.local import LocalFolder
from tests.partitions import write_partition
from tests.tol.conftest import random_model

IDS = torch.arange(120).view(4, 30) ** 2 % 601


# Largest difference of logits relative to their largest value. bf16 rounds each m_l to 2^-9 of itself.
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("tier", get_args(Tier))
def test_lookup_equals_compute(
    tables: dict[str, Path], exported: Path, model: Transformer, dtype: str, limit: float, tier: Tier
) -> None:
    served = load_model(exported, with_memory=False)
    computed = model(IDS, make_source("per_token", model.memory_blocks()))
    looked_up = served(IDS, TolSource.open_folder(tables[dtype], served.config, StoreOptions(tier)))
    assert (looked_up - computed).abs().max() <= limit * computed.abs().max()


def test_dropped_layer_reads_as_zeros(model: Transformer, tables: dict[str, Path], tmp_path: Path) -> None:
    table = torch.stack(
        [model.memory_blocks()[layer].ffn_m(model.embed_tokens.weight) for layer in (0, 2)], dim=1
    )
    path = tmp_path / "rows.safetensors"
    partition = write_partition(path, (0, 601), RowShape.plain("float32", 2, 32), table.split(100))
    index = read_index(tables["float32"])
    write_index(LocalFolder(tmp_path), index.model_copy(update={"layers": [0, 2], "partitions": [partition]}))
    x0 = model.embed_tokens(IDS).bfloat16()
    read = TolSource.open_folder(tmp_path, model.config).open(IDS, x0)
    assert torch.equal(read(1), torch.zeros_like(x0))
    assert torch.equal(read(2), table[IDS, 1].bfloat16())


def test_wrong_or_damaged_tables(model: Transformer, tables: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tables["float32"], tmp_path / "tol")
    for fields, message in (
        ({"vocab_size": 600}, "vocab_size=601"),
        ({"hidden_size": 16}, "hidden_size"),
        ({"num_hidden_layers": 2}, "num_layers"),
        ({"kind": "base"}, "base model"),
    ):
        with pytest.raises(UserError, match=message):
            TolSource.open_folder(folder, random_model(**fields).config)
    whole = (folder / INDEX).read_text()
    tree = json.loads(whole)
    (folder / INDEX).write_text(json.dumps(tree | {"dtype": "bfloat16", "digest": None}))
    with pytest.raises(UserError, match=r"holds \[50, 3, 32\] F32, not \[50, 3, 32\] BF16"):
        TolSource.open_folder(folder, model.config)
    (folder / INDEX).write_text(whole)
    file = folder / tree["partitions"][3]["file"]
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=file.name):
        TolSource.open_folder(folder, model.config)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} .*is missing"):
        TolSource.open_folder(folder, model.config)
