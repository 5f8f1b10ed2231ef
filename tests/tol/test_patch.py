"""Patches: rows changed beside a table, applied in order, and refused where they do not belong."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.model.transformer import Transformer
from mlm_train.tol.serve.source import TolSource
from tests.commands import mlm_train, outcome, refused
from tests.partitions import write_table


@pytest.fixture(scope="module")
def table(model: Transformer, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("patched") / "tol", model, exported, (200,))


def rows_of(table: Path, model: Transformer, *patches: Path) -> Tensor:
    """All rows as a model gets them: [vocabulary, layers, hidden]."""
    ids = torch.arange(model.config.vocab_size).view(1, -1)
    read = TolSource.open_folder(table, model.config, patches=patches).open(ids, model.embed_tokens(ids))
    return torch.stack([read(layer)[0] for layer in range(model.config.num_hidden_layers)], dim=1)


def test_each_change_and_nothing_else(
    table: Path, model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in table.iterdir()}
    expected, first, second = rows_of(table, model), tmp_path / "first", tmp_path / "second"
    own = torch.randn(2, 3, 32)
    save_file({"ids": torch.tensor([600, 4]), "rows": own}, tmp_path / "rows")
    changes = ("--scale", "17=0.5", "4=-2", "--silence", "42", "199", "--copy", "7=200")
    mlm_train("tol", "patch", "create", table, "--output", first, *changes, "--rows", tmp_path / "rows")
    mlm_train("tol", "patch", "create", table, "--output", second, "--scale", "17=3", "--layers", "0,2")
    capsys.readouterr()
    mlm_train("tol", "patch", "list", first)
    assert capsys.readouterr().out.splitlines() == [
        "600: edited (rows)", "4: edited (rows)", "7: replaced by 200", "17: scaled by 0.5",
        "4: scaled by -2", "42: silenced", "199: silenced",
    ]  # fmt: skip
    changed = expected.clone()
    changed[600], changed[4], changed[7] = own[0], -2 * own[1], expected[200]
    changed[[42, 199]] = 0.0
    changed[17] = 0.5 * expected[17]
    assert torch.equal(rows_of(table, model, first), changed)
    changed[17] = expected[17] * torch.tensor([3.0, 1.0, 3.0])[:, None]  # the later patch's row
    assert torch.equal(rows_of(table, model, first, second), changed)
    assert torch.equal(rows_of(table, model), expected), "left out, nothing is changed"
    assert {path.name: path.read_bytes() for path in table.iterdir()} == before


def test_patches_that_do_not_belong(table: Path, model: Transformer, exported: Path, tmp_path: Path) -> None:
    patch, create = tmp_path / "patch", ("tol", "patch", "create", table, "--output")
    mlm_train(*create, patch, "--silence", 3)
    for words, message in (
        ((patch, "--silence", 3), "exists already"),
        ((tmp_path / "new",), "needs a change"),
        ((tmp_path / "new", "--silence", 601), "token 601: there is no such token; give 0 to 600"),
        ((tmp_path / "new", "--silence", "the"), "give ids, or a --model"),
        ((tmp_path / "new", "--scale", "3"), "give TOKEN=VALUE"),
        ((tmp_path / "new", "--scale", "3=nan"), "the factor must be a number"),
        ((tmp_path / "new", "--silence", 3, "--layers", "3"), "there is no layer 3"),
        ((tmp_path / "new", "--rows", table / "0.safetensors"), "needs tensors ids and rows"),
    ):
        assert message in refused(*create, *words)
    other = write_table(tmp_path / "other", model, exported, (10,))
    with pytest.raises(UserError, match="was made for another table"):
        rows_of(other, model, patch)
    data = bytearray(patch.read_bytes())
    data[-1] ^= 1
    patch.write_bytes(data)
    with pytest.raises(UserError, match="damaged: its SHA-256 differs"):
        rows_of(table, model, patch)
    for file in (table / "0.safetensors", tmp_path):
        assert outcome("tol", "patch", "list", file)[0] == 2


def test_a_patch_is_plain_tensors(table: Path, tmp_path: Path) -> None:
    """For a reader in any language."""
    mlm_train("tol", "patch", "create", table, "--output", tmp_path / "p", "--silence", 3, 1)
    tensors = load_file(tmp_path / "p")
    assert tensors["ids"].tolist() == [1, 3] and tensors["rows"].shape == (2, 3, 32)
    shutil.rmtree(tmp_path)
