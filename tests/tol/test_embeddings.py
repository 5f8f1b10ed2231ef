"""Tables that hold x0 too: built, compressed, verified, and served to a model without an embedding."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.errors import UserError
from mlm_train.model.transformer import Transformer
from mlm_train.tol.allocate.mixes import size_of
from mlm_train.tol.build.builder import Build
from mlm_train.tol.format.index import BASIS, INDEX, X0
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.schemes import Encoding, Scheme
from mlm_train.tol.serve import layers
from mlm_train.tol.serve.reader import RowDecoder, TableReader
from mlm_train.tol.serve.source import TolSource
from mlm_train.tol.serve.store import StoreOptions, Tier
from mlm_train.tol.tools.inspect import inspect_tol
from mlm_train.tol.tools.patch import PatchMaker
from mlm_train.tol.tools.verify import verify_tol
from mlm_train.tol.tools.vocabulary import Vocabulary
from tests.commands import mlm_train, refused
from tests.partitions import write_table
from tests.tol.conftest import export, random_model
from tests.tol.test_build import digests

IDS = torch.arange(120).view(4, 30) ** 2 % 601
CUT = [Scheme(dtype="int4", group_size=8), Scheme(dtype="float16", rank=20), Scheme(dtype="bfloat16")]


@pytest.fixture(scope="module")
def table(exported: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp32, filled layer by layer."""
    folder = tmp_path_factory.mktemp("embeddings") / "float32"
    options: dict[str, Any] = {"partitions": 3, "chunk_rows": 100, "group_bytes": 1}
    Build(exported, folder, TableSpec(dtype="float32"), with_embeddings=True, **options).run(1)
    return folder


@pytest.fixture(scope="module")
def cut(table: Path) -> Path:
    """Compressed from it: int4, low rank, and a plain type."""
    folder = table.parent / "cut"
    Build(None, folder, TableSpec(schemes=CUT), table=table, partitions=3).run(1)
    return folder


def test_rows(table: Path, tables: dict[str, Path], exported: Path, model: Transformer) -> None:
    """x0 comes first, as the weights have it; the layers are those of a table without it."""
    reader, plain = (TableReader.open_folder(folder) for folder in (table, tables["float32"]))
    index = reader.index
    assert index.embedding == Encoding(dtype="float32", codes=0) and index.layers == [0, 1, 2]
    assert (index.dtype, index.row_bytes) == ("float32", 4 * 32 * 4)
    assert RowDecoder(index, {}).alike == Encoding(dtype="float32", codes=0)  # x0 is not in the way
    rows, other = reader.range(0, 601), plain.range(0, 601)
    assert torch.equal(reader.values(rows, X0), model.embed_tokens.weight)
    assert plain.values(other, X0) is None and "embedding" not in (tables["float32"] / INDEX).read_text()
    assert all(torch.equal(reader.values(rows, layer), plain.values(other, layer)) for layer in range(3))
    assert verify_tol(table, exported).damages == []
    assert inspect_tol(table).sizes.embedding == 4 * 32


def test_compressed(table: Path, cut: Path, exported: Path, model: Transformer, tmp_path: Path) -> None:
    """x0 stays as it is, and no budget, search or allocation takes it for a layer."""
    reader = TableReader.open_folder(cut)
    assert torch.equal(reader.values(reader.range(0, 601), X0), model.embed_tokens.weight)
    assert read_index(cut).layers == [0, 1, 2] and (cut / BASIS).exists()
    assert size_of(read_index(table), dict(enumerate(CUT))) == read_index(cut).bytes + 5 * 4096
    assert verify_tol(cut, exported).damages == []
    budget = 601 * 200 + 8 * 4096
    compress = ("tol", "compress", table, "--workers", 1, "--output", tmp_path / "small", "--budget")
    assert "is too small for any layer" in refused(*compress, f"{601 * 128 + 8 * 4096}B")
    mlm_train(*compress, f"{budget}B")
    index = read_index(tmp_path / "small")
    assert 0.9 * budget < index.bytes <= budget and index.embedding_dtype == "float32"


@pytest.mark.parametrize("tier", get_args(Tier))
def test_served_without_an_embedding(
    tier: Tier,
    table: Path,
    cut: Path,
    tables: dict[str, Path],
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit what a model with the embedding's weights gives."""
    bare, whole = (load_model(exported, with_memory=False, embeds=embeds) for embeds in (False, True))
    assert not any("embed" in name for name, _ in bare.named_parameters())

    def logits(model: Transformer, folder: Path) -> torch.Tensor:
        source = TolSource.open_folder(folder, model.config, StoreOptions(tier))
        found = model(IDS, source)
        assert source.store.counters.distinct == len(IDS.unique())  # a row is read once
        source.store.close()
        return found

    assert torch.equal(logits(bare, table), logits(whole, tables["float32"]))
    assert torch.equal(logits(bare, cut), logits(whole, cut))
    monkeypatch.setattr(layers, "TOGETHER", 0)  # layer by layer, as of many rows
    assert torch.equal(logits(bare, table), logits(whole, tables["float32"]))
    half = bare.to(torch.bfloat16)
    assert torch.equal(logits(half, table), logits(whole.to(torch.bfloat16), tables["float32"]))
    with pytest.raises(AssertionError):
        logits(half, tables["float32"])


def test_patches_change_layers_alone(table: Path, model: Transformer, tmp_path: Path) -> None:
    maker = PatchMaker(table, Vocabulary(601, None))
    maker.silence("5")
    maker.made().write(tmp_path / "patch", table)
    source = TolSource.open_folder(table, model.config, patches=[tmp_path / "patch"])
    x0, read = source.open_with_x0(torch.tensor([[5, 6]]), torch.float32)
    assert torch.equal(x0[0], model.embed_tokens.weight[5:7])
    assert not read(1)[0, 0].any() and read(1)[0, 1].any()


def test_damage_is_found_and_repaired(table: Path, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table, tmp_path / "tol")
    before, partition = digests(folder), read_index(folder).partitions[1]
    file = folder / partition.file
    data = bytearray(file.read_bytes())
    data[4096 + 7 * 512 + 3] ^= 1  # in x0 of the eighth row
    file.write_bytes(data)
    row = partition.rows[0] + 7
    assert [str(damage) for damage in verify_tol(folder, exported).damages[1:]] == [
        f"{partition.file}: rows [{row}, {row + 1}): embeddings are not the model's"
    ]
    assert "leave --with-embeddings out" in refused(
        "tol", "build", exported, "--output", folder, "--repair", "--with-embeddings"
    )
    mlm_train("tol", "build", exported, "--output", folder, "--repair", "--workers", 1)
    assert digests(folder) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding": {"dtype": "int8", "group_size": 8, "scales": 0, "codes": 8}}, "a plain type"),
        ({"embedding": {"dtype": "float32", "rank": 8, "codes": 0}}, "a plain type"),
        ({"embedding": {"dtype": "float32", "codes": 4}}, "overlap"),
        ({"embedding": {"dtype": "float32", "codes": 1024}}, "it holds"),
        ({"encodings": None}, "an embedding needs encodings"),
    ],
)
def test_wrong_entries(fields: dict[str, Any], message: str, table: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table, tmp_path / "tol")
    tree = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(tree | fields | {"digest": None}))
    with pytest.raises(UserError, match=message):
        TableReader.open_folder(folder)


def test_tied_and_other_models(table: Path, tmp_path: Path) -> None:
    tied = export(tmp_path / "tied", random_model(tie_word_embeddings=True))
    build = ("tol", "build", tied, "--output", tmp_path / "tol", "--with-embeddings")
    assert "ties its embedding to its head" in refused(*build)
    for fields, message in (
        ({"tie_word_embeddings": True}, "has embeddings, and the model ties"),
        ({"hidden_size": 16}, "hidden_size"),
    ):
        with pytest.raises(UserError, match=message):
            TolSource.open_folder(table, random_model(**fields).config)


def test_the_same_command_again(exported: Path, model: Transformer, tmp_path: Path) -> None:
    """A finished table with embeddings is none without them; nothing is built."""
    folder = write_table(tmp_path / "tol", model, exported, [300], with_embeddings=True)
    options: dict[str, Any] = {"partitions": 2, "compute": "float32"}
    for given in (True, False):
        build = Build(exported, folder, TableSpec(dtype="float32"), with_embeddings=given, **options)
        if given:
            assert build.finished() is not None
        else:
            with pytest.raises(UserError, match="holds another table"):
                build.finished()
