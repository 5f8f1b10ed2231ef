"""Compressed tables: rows read back are FFN-M's values rounded by their scheme, from weights or a table."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.cli import main
from mlm_train.data.prepared import PreparedData
from mlm_train.errors import UserError
from mlm_train.memory import make_source
from mlm_train.model.transformer import Transformer
from mlm_train.tol.build.builder import Build
from mlm_train.tol.format.index import BASIS, INDEX
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.schemes import Scheme
from mlm_train.tol.serve.reader import TableReader
from mlm_train.tol.serve.source import TolSource
from mlm_train.tol.serve.store import StoreOptions, Tier
from mlm_train.tol.tools.verify import verify_tol
from tests.commands import mlm_train, refused
from tests.tol.conftest import export, random_model
from tests.tol.test_build import digests

MIXED = [
    Scheme(dtype="int4", group_size=8, symmetric=False),
    Scheme(dtype="float16", rank=20),
    Scheme(dtype="int8", group_size=16),
]
SPECS = {
    "int8": (TableSpec(dtype="int8", group_size=16), 0.006),
    "int4": (TableSpec(dtype="int4", group_size=8, symmetric=False), 0.07),
    "rank": (TableSpec(dtype="bfloat16", rank=24), 0.25),
    "rank and bits": (TableSpec(dtype="int8", group_size=8, rank=24), 0.25),
    "mixed": (TableSpec(schemes=MIXED), 0.4),
    "dropped": (TableSpec(dtype="int8", group_size=16, layers=[0, 2]), 0.006),
}


def build(source: Path, output: Path, spec: TableSpec, workers: int = 1, **options: Any) -> None:
    """By one worker, a process that imports torch: how many there are changes no byte, as is tested below."""
    from_table = (source / INDEX).is_file()
    origin = {"model": None, "table": source} if from_table else {"model": source}
    options = {"partitions": 3, "chunk_rows": 100} | options
    Build(**origin, output=output, spec=spec, **options).run(workers)


def true_rows(model: Transformer) -> Tensor:
    """FFN-M of every token in float64: [vocabulary, layers, hidden]."""
    blocks = [block.double() for block in random_model().memory_blocks().values()]
    return torch.stack([block.ffn_m(model.embed_tokens.weight.double()) for block in blocks], dim=1)


def stored_rows(folder: Path) -> dict[int, Tensor]:
    table = TableReader.open_folder(folder)
    rows = table.range(0, table.index.vocab_size)
    values = {layer: table.values(rows, layer) for layer in table.index.layers}
    return {layer: stored.double() for layer, stored in values.items() if stored is not None}


@pytest.mark.parametrize("name", SPECS)
def test_from_weights_and_from_a_table(
    name: str, ray: None, tables: dict[str, Path], exported: Path, model: Transformer, tmp_path: Path
) -> None:
    spec, limit = SPECS[name]
    true = true_rows(model)
    for source, folder in ((exported, tmp_path / "weights"), (tables["float32"], tmp_path / "table")):
        build(source, folder, spec)
        index, stored = read_index(folder), stored_rows(folder)
        assert list(stored) == (spec.layers or [0, 1, 2]) and index.errors is not None
        for (layer, rows), recorded in zip(stored.items(), index.errors, strict=True):
            error = float((rows - true[:, layer]).norm() / true[:, layer].norm())
            assert error < limit and recorded == pytest.approx(error, rel=1e-4)
        report = verify_tol(folder, exported)
        assert not report.damages and report.recomputed == 601
        assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) == index.bytes


def test_low_rank_is_the_best_of_its_rank(
    ray: None, exported: Path, model: Transformer, tmp_path: Path
) -> None:
    build(exported, tmp_path / "tol", TableSpec(dtype="float32", rank=12))
    for layer, rows in stored_rows(tmp_path / "tol").items():
        true = true_rows(model)[:, layer]
        left = torch.linalg.svdvals(true)[12:].norm()
        assert float((rows - true).norm()) == pytest.approx(float(left), rel=1e-3)
        assert torch.linalg.matrix_rank(rows, rtol=1e-5) == 12


def test_a_budget_is_kept_and_used_where_it_counts(ray: None, tmp_path: Path) -> None:
    """Layer 1 has half the rank by its weights: it gets a lower rank than the others."""
    model = random_model()
    model.memory_blocks()[1].memory_mlp.down_proj.weight[16:] = 0.0
    source = export(tmp_path / "model", model)
    for budget in (40_000, 70_000, 100_000):
        folder = tmp_path / str(budget)
        build(source, folder, TableSpec(dtype="float16", budget=budget))
        index = read_index(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert 0.75 * budget <= size <= budget
        ranks = dict(zip(index.layers, index.rank or [], strict=True))
        assert all(ranks.get(1, 0) <= min(16, ranks.get(layer, 32)) for layer in (0, 2))
    with pytest.raises(UserError, match=r"is too small for any layer; give at least .* for float16 in "):
        build(source, tmp_path / "none", TableSpec(dtype="float16", budget=3_000))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["int4", "rank and bits", "mixed"])
def test_groups_of_layers_and_workers_do_not_change_a_byte(
    name: str, ray: None, exported: Path, tmp_path: Path
) -> None:
    """All layers at once and sequentially, or group by group, as for few partitions."""
    spec, _ = SPECS[name]
    for folder, workers, options in (("one", 1, {}), ("few", 2, {}), ("groups", 1, {"group_bytes": 1})):
        build(exported, tmp_path / folder, spec, workers, partitions=8, chunk_rows=75, **options)
        assert digests(tmp_path / "one") == digests(tmp_path / folder)
        assert read_index(tmp_path / "one").errors == read_index(tmp_path / folder).errors


def test_groups(exported: Path, tmp_path: Path) -> None:
    """Of 3 layers: what fits into memory, and at least 8 tasks per worker."""

    def groups(partitions: int, workers: int, **options: Any) -> list[int]:
        built = Build(exported, tmp_path / "tol", TableSpec(), **options)
        return [len(group) for group in built.groups(partitions, workers)]

    assert groups(8, 1) == groups(99, 2) == [3]
    assert groups(15, 2) == [1, 2] and groups(5, 2) == groups(1, 1) == [1, 1, 1]
    layer = 3 * 32 * 44 * 4
    assert groups(8, 1, group_bytes=2 * layer) == [1, 2] and groups(8, 1, group_bytes=1) == [1, 1, 1]
    assert groups(8, 1, chunk_rows=2**21) == [1, 1, 1]  # rows take memory, too


def test_a_model_serves_from_it(
    ray: None, exported: Path, model: Transformer, tables: dict[str, Path], tmp_path: Path
) -> None:
    ids = torch.arange(120).view(4, 30) ** 2 % 601
    served = load_model(exported, with_memory=False)
    computed = model(ids, make_source("per_token", model.memory_blocks()))
    for name, limit in (("int8", 0.01), ("int4", 0.1)):
        build(tables["float32"], tmp_path / name, SPECS[name][0])
        for tier in get_args(Tier):
            source = TolSource.open_folder(tmp_path / name, served.config, StoreOptions(tier))
            found = served(ids, source)
            assert (found - computed).abs().max() <= limit * computed.abs().max()
            whole = source.open(ids, computed[..., :32])
            part = TolSource.open_folder(
                tmp_path / name, served.config, StoreOptions(tier), layers=[1, 2]
            ).open(ids, computed[..., :32])
            assert all(torch.equal(part(layer), whole(layer)) for layer in (1, 2))


def test_bfloat16_matmuls(ray: None, exported: Path, model: Transformer, tmp_path: Path) -> None:
    build(exported, tmp_path / "tol", TableSpec(dtype="bfloat16"), compute="bfloat16")
    index = read_index(tmp_path / "tol")
    assert index.source.compute == "bfloat16" and not verify_tol(tmp_path / "tol", exported).damages
    for layer, rows in stored_rows(tmp_path / "tol").items():
        true = true_rows(model)[:, layer]
        assert 1e-4 < float((rows - true).norm() / true.norm()) < 2e-2


def test_a_wrong_value_in_an_intact_file_is_found(ray: None, exported: Path, tmp_path: Path) -> None:
    """A table of other weights under this model's fingerprint."""
    build(exported, tmp_path / "tol", SPECS["int8"][0])
    other = export(tmp_path / "other", random_model(intermediate_size=30))
    build(other, tmp_path / "wrong", SPECS["int8"][0])
    tree = json.loads((tmp_path / "wrong" / INDEX).read_text())
    tree["source"] = json.loads((tmp_path / "tol" / INDEX).read_text())["source"]
    tree["digest"] = None
    (tmp_path / "wrong" / INDEX).write_text(json.dumps(tree))
    damages = [str(damage) for damage in verify_tol(tmp_path / "wrong", exported).damages]
    assert len(damages) == 3 and all("values are not FFN-M's" in damage for damage in damages)


@pytest.mark.parametrize("name", ["int4", "rank"])
def test_repair_rebuilds_damaged_partitions(
    name: str, ray: None, exported: Path, tables: dict[str, Path], tmp_path: Path
) -> None:
    for source, action in ((exported, "build"), (tables["bfloat16"], "compress")):
        folder = tmp_path / action
        build(source, folder, SPECS[name][0])
        before, index = digests(folder), (folder / INDEX).read_bytes()
        first, second, third = read_index(folder).partitions
        (folder / first.file).unlink()
        data = bytearray((folder / second.file).read_bytes())
        data[-1] ^= 1
        (folder / second.file).write_bytes(data)
        untouched = (folder / third.file).stat().st_mtime_ns
        command = ["tol", action, str(source), "--output", str(folder), "--repair"]
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert not ended.value.code
        assert digests(folder) == before and (folder / INDEX).read_bytes() == index
        assert (folder / third.file).stat().st_mtime_ns == untouched


def test_repair_rejects_bad_input(ray: None, exported: Path, tables: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "tol"
    build(exported, table, SPECS["rank"][0])
    other = export(tmp_path / "other", random_model(intermediate_size=30))
    assert "was not built from" in refused("tol", "build", other, "--output", table, "--repair")
    assert "does not exist" in refused("tol", "build", exported, "--output", tmp_path / "no", "--repair")
    (table / BASIS).write_bytes(b"x" * 100)
    assert f"{BASIS} is damaged: build" in refused("tol", "build", exported, "--output", table, "--repair")
    for model in (None, exported):
        report = verify_tol(table, model)
        damages = [(damage.file, damage.start, damage.stop) for damage in report.damages]
        assert damages == [(BASIS, 0, 601)]
        assert report.recomputed == 0 and "into a new folder" in report.fix
    (table / BASIS).unlink()
    with pytest.raises(SystemExit) as ended:
        main(["tol", "verify", str(table)])
    assert ended.value.code == 2


def test_damaged_rows_are_not_compressed(
    ray: None, exported: Path, tables: dict[str, Path], tmp_path: Path
) -> None:
    """Found before anything is written, and when a table is repaired from them."""
    source, output = shutil.copytree(tables["bfloat16"], tmp_path / "source"), tmp_path / "out"
    file = source / read_index(source).partitions[2].file
    whole = file.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    file.write_bytes(flipped)
    message = r"rows-00002.*rows \[150, 250\).* is damaged: .*repair it with `mlm-train tol build MODEL"
    for spec in (SPECS["int8"][0], SPECS["rank"][0]):
        with pytest.raises(UserError, match=message):
            build(source, output, spec)
    assert not list(output.glob("*.safetensors"))
    file.write_bytes(whole)
    build(source, output, SPECS["int8"][0])
    damaged = output / read_index(output).partitions[2].file
    damaged.unlink()
    assert "tol compress TABLE" in verify_tol(output).fix
    file.write_bytes(flipped)  # its rows are not needed for the repair
    mlm_train("tol", "compress", source, "--output", output, "--repair")
    assert damaged.is_file() and not verify_tol(output).damages


def test_bad_options(tables: dict[str, Path], exported: Path, tmp_path: Path) -> None:
    table, output = tables["bfloat16"], ("--output", tmp_path / "out")
    whole = allocation(tmp_path / "whole.json", [0, 1])
    cases = {
        ("--dtype", "bfloat16", "--group-size", 8): "--group-size and --asymmetric are for int8 and int4",
        ("--dtype", "int8", "--group-size", 0): "--group-size 0: give 1 to 64",
        ("--dtype", "int8", "--group-size", 10**20): "00000: give 1 to 64",
        ("--dtype", "int8", "--rank", 33): "--rank 33: give 1 to 32 (hidden_size)",
        ("--dtype", "int8", "--rank", 3, "--budget", "1MB"): "give --rank or --budget",
        ("--dtype", "int8", "--budget", "much"): "argument --budget: 'much' is not a size such as 40MB",
        ("--dtype", "int8", "--drop", "5"): "--drop 5: there is no layer 5; the layers are [0, 1, 2]",
        ("--dtype", "int8", "--drop", "0-2"): "--drop 0-2 leaves no layer",
        ("--dtype", "int8", "--drop", "x"): "--drop x: give layers such as",
        ("--dtype", "int8", "--drop", ""): "--drop '': give layers such as",
        ("--dtype", "int8", "--drop", "0-"): "--drop 0-: give layers such as",
        ("--dtype", "int8", "--drop", "0,"): "--drop 0,: give layers such as",
        ("--dtype", "int8", "--drop", "9" * 5000): "give layers such as",
        ("--dtype", "int8", "--drop", "0-99999999999999"): "there is no layer 3; the layers are [0, 1, 2]",
        ("--dtype", "int8", "--drop", "2-1"): "--drop 2-1: 2-1 ends before it starts; write 1-2",
        (
            "--allocation",
            whole,
            "--dtype",
            "int8",
        ): "sets how every layer is stored: leave --dtype out",
        ("--allocation", whole, "--drop", "0", "--asymmetric"): "leave --asymmetric, --drop out",
        ("--allocation", ""): "--allocation .: cannot be read: Is a directory",
        ("--repair", "--dtype", "int8"): "as it was: leave --dtype out",
        ("--repair", "--partitions", 3, "--evaluate", "x"): "leave --partitions, --evaluate out",
        ("--dtype", "int8", "--each-node"): "--each-node needs --ray-address",
        ("--dtype", "int8", "--threads", 0): "--threads 0: give at least 1",
    }
    for arguments, message in cases.items():
        assert message in refused("tol", "compress", table, *output, *arguments), arguments
        assert message in refused("tol", "build", exported, *output, *arguments), arguments
    assert "does not exist" in refused("tol", "compress", exported, *output, "--dtype", "int8")
    assert "--dtype, --budget or --allocation" in refused("tol", "compress", table, *output)
    more = ("--dtype", "int8", "--model", exported)
    assert "give --evaluate DATA too" in refused("tol", "compress", table, *output, *more)
    assert "leave --model out" in refused("tol", "compress", table, *output, "--repair", *more[2:])
    again = ("--repair", "--compute", "auto")
    assert "leave --compute out" in refused("tol", "build", exported, *output, *again)
    assert not (tmp_path / "out").exists()


def allocation(file: Path, layers: list[int], count: int | None = None, **fields: object) -> Path:
    """A file such as `tol allocate` writes."""
    scheme = {"dtype": "int4", "group_size": 16} | fields
    schemes = [scheme] * (len(layers) if count is None else count)
    file.write_text(json.dumps({"layers": layers, "schemes": schemes, "more": None}))
    return file


@pytest.mark.parametrize(
    ("layers", "fields", "message"),
    [
        ([0, 9], {}, "of another model: it has layer 9; the layers are [0, 1, 2]"),
        ([2, 0], {}, "its layers are not in ascending order, each once: [2, 0]"),
        ([0, 1, 1], {}, "its layers are not in ascending order, each once: [0, 1, 1]"),
        ([0, 1], {"count": 1}, "it has 2 layers and 1 schemes: each layer needs one"),
        ([], {}, "it has 0 layers and 0 schemes"),
        ([0], {"rank": 33}, "layer 0 has rank 33 of 32"),
        ([0], {"group_size": 10**30}, "schemes.0.group_size: input should be less than or equal to"),
        ([0], {"dtype": "bfloat16"}, "schemes.0: bfloat16 has no group_size"),
        ([0], {"speed": 3}, "schemes.0.speed: extra inputs are not permitted"),
    ],
)
def test_wrong_allocations(
    exported: Path, tmp_path: Path, layers: list[int], fields: dict[str, Any], message: str
) -> None:
    file = allocation(tmp_path / "mix.json", layers, **fields)
    line = refused("tol", "build", exported, "--output", tmp_path / "out", "--allocation", file)
    assert message in line and line.endswith("write one with `mlm-train tol allocate`")
    assert line.count(str(file)) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 10**5, "no JSON"),
        (b"null", "no allocation: it has no layers"),
        (b'{"layers": [0]}', "no allocation: it has no schemes"),
        (b'{"layers": {}, "schemes": []}', "layers: input should be a valid list"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_files_that_are_no_allocations(
    exported: Path, tmp_path: Path, data: bytes | None, message: str
) -> None:
    file = tmp_path / "mix.json"
    if data is not None:
        file.write_bytes(data)
    line = refused("tol", "build", exported, "--output", tmp_path / "out", "--allocation", file)
    assert f"--allocation {file}: {message}; write one with" in line and line.count(str(file)) == 1


def test_a_dropped_layer_cannot_come_back(ray: None, tables: dict[str, Path], tmp_path: Path) -> None:
    build(tables["bfloat16"], tmp_path / "two", TableSpec(dtype="int8", group_size=8, layers=[0, 2]))
    assert "there is no layer 1; the layers are [0, 2]" in refused(
        "tol", "compress", tmp_path / "two", "--output", tmp_path / "out", "--dtype", "int4", "--drop", "1"
    )
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    build(tmp_path / "two", tmp_path / "again", TableSpec(dtype="int4", group_size=8))
    assert read_index(tmp_path / "again").layers == [0, 2]


def test_low_rank_of_the_tokens_of_a_text(
    tables: dict[str, Path], exported: Path, model: Transformer, data: Path, tmp_path: Path
) -> None:
    """Against SVDs in float64: each of two tables is the best of its rank for what it was chosen for."""
    for name, more in (("rows", ()), ("text", ("--weigh-by", data))):
        options = ("--dtype", "float32", "--rank", 8, "--workers", 1, *more)
        mlm_train("tol", "compress", tables["float32"], "--output", tmp_path / name, *options)
    text = PreparedData.open(data)
    counts = 1 + torch.bincount(torch.from_numpy(text.split("train").tokens.astype("int64")), minlength=601)
    true = true_rows(model)
    stored = {name: stored_rows(tmp_path / name) for name in ("rows", "text")}
    for layer in range(3):
        rows = true[:, layer]
        for name, weights in (("rows", torch.ones(601)), ("text", counts)):
            roots = weights.double().sqrt().unsqueeze(1)
            least = torch.linalg.svdvals(rows * roots)[8:].square().sum()
            errors = {n: ((values[layer] - rows) * roots).square().sum() for n, values in stored.items()}
            assert errors[name] == pytest.approx(float(least), rel=1e-2)
            assert errors[name] < 0.95 * max(errors.values())
    source = json.loads((tmp_path / "text" / INDEX).read_text())["source"]
    assert source["text"] == text.manifest.fingerprint
    assert "text" not in json.loads((tmp_path / "rows" / INDEX).read_text())["source"]
    again = ("tol", "compress", tables["float32"], "--output", tmp_path / "rows", "--dtype", "float32")
    assert "holds another table" in refused(*again, "--rank", 8, "--weigh-by", data)
    assert "give --rank or --budget, or leave it out" in refused(*again, "--weigh-by", data)
