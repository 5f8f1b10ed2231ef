"""The statistics of `tol inspect` against float64 over all rows at once."""

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.data.tokenizer import tokenizer_of
from mlm_train.errors import UserError
from mlm_train.model.logical import named_pieces
from mlm_train.tol.build.builder import Build
from mlm_train.tol.format.codec import TORCH_DTYPE
from mlm_train.tol.format.index import INDEX, Provenance, TolIndex
from mlm_train.tol.format.index_file import write_index
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.serve.reader import TableReader
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.tools.inspect import Inspection, Scored, inspect_tol
from mlm_train.utils import files
from tests.commands import mlm_train, refused
from tests.partitions import write_partition
from tests.tol.conftest import export, random_model


def alike(rows: int, layers: int = 2, hidden: int = 32) -> Tensor:
    """Random rows fp32 [rows, layers, hidden], with a new seed in every run; neighbours are similar."""
    generator = torch.Generator()
    print("seed", generator.seed())
    steps = torch.randn(rows, layers, hidden, generator=generator)
    scales = torch.logspace(0, -1.5, hidden) * (1 + 4 * torch.rand(rows, layers, 1, generator=generator))
    return (steps + steps.roll(1, 0) + 0.3) * scales


def write(folder: Path, rows: Tensor, dtype: str = "float32", layers: tuple[int, ...] = (0, 2)) -> Path:
    """Write a table of these rows in two partitions, of a model of three layers."""
    folder.mkdir()
    vocab, _, hidden = rows.shape
    shape = RowShape.plain(dtype, len(layers), hidden)
    partitions = [
        write_partition(folder / f"rows-{start}.safetensors", (start, stop), shape, [rows[start:stop]])
        for start, stop in ((0, vocab // 3), (vocab // 3, vocab))
    ]
    index = TolIndex(
        vocab_size=vocab,
        num_layers=3,
        hidden_size=hidden,
        dtype=dtype,
        layers=list(layers),
        partitions=partitions,
        source=Provenance(checkpoint="0" * 64, created="now", tool_version="0"),
    )
    write_index(LocalFolder(folder), index)
    return folder


def check(found: Inspection, layers: list[Tensor], top: int, loose: float = 1e-5) -> None:
    """Compare with float64 over the rows [V, h] of each layer."""
    for one, rows in zip(found.layers, layers, strict=True):
        norms = rows.norm(dim=1)
        expected = {"mean": norms.mean(), "median": norms.quantile(0.5), "max": norms.max()}
        for name, value in expected.items():
            assert one.norms[name] == pytest.approx(float(value), rel=loose)
        true = torch.linalg.svdvals(rows)[: len(one.singular_values)]
        assert (torch.tensor(one.singular_values) - true).abs().max() <= 3e-4 * true[0]
        assert one.stable_rank == pytest.approx(float((true / true[0]).square().sum()), rel=1e-4)
        energy = true.square().cumsum(0) / true.square().sum()
        assert list(one.ranks) == ["90%", "99%", "99.9%"]
        for share, rank in zip((0.9, 0.99, 0.999), one.ranks.values(), strict=True):
            assert energy[rank - 1] >= share - 1e-6
            assert rank == 1 or energy[rank - 2] < share + 1e-6
        check_list(one.largest, norms, top)
    whole = torch.cat(layers, dim=1)
    lengths = whole.norm(dim=1)
    check_list(found.largest, lengths, top)
    unit = whole / lengths.unsqueeze(1)
    cosines = unit @ unit.T
    likeness = found.likeness
    assert likeness.consecutive == pytest.approx(float(cosines.diagonal(1).mean()), rel=1e-4)
    pairs = cosines[~torch.eye(len(whole), dtype=torch.bool)]
    assert likeness.random == pytest.approx(float(pairs.mean()), rel=1e-4, abs=1e-6)
    change = whole.diff(dim=0).square().sum() / whole[1:].square().sum()
    assert likeness.change == pytest.approx(float(change), rel=1e-4)
    for asked in found.neighbours:
        others = cosines[asked.id].clone()
        others[asked.id] = -torch.inf
        check_list(asked.nearest, others, top)


def check_list(tokens: list[Scored], scores: Tensor, top: int) -> None:
    """The tokens have these scores [V], and no other token has a higher one."""
    assert len({token.id for token in tokens}) == len(tokens) == top
    values = torch.tensor([token.value for token in tokens], dtype=torch.float64)
    torch.testing.assert_close(values, scores[[token.id for token in tokens]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values, scores.topk(top).values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain(tmp_path: Path, dtype: str) -> None:
    """1,300 rows are three chunks; the given tokens are at their edges, and one is given twice."""
    rows = alike(1300).to(TORCH_DTYPE[dtype])
    folder = write(tmp_path / "tol", rows, dtype)
    found = inspect_tol(folder, top=7, neighbours=["512", "0", "1299", "511", "512"])
    assert [asked.id for asked in found.neighbours] == [512, 0, 1299, 511, 512]
    check(found, [layer.double() for layer in rows.unbind(1)], top=7)
    assert found.likeness.consecutive is not None and found.likeness.consecutive > 0.2
    item = TORCH_DTYPE[dtype].itemsize
    assert [(one.layer, one.bytes) for one in found.layers] == [(layer, 1300 * 32 * item) for layer in (0, 2)]
    assert found.sizes.row == 64 * item and found.sizes.other == 2 * 4096
    assert found.sizes.bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert (found.sizes.bfloat16, found.sizes.ffn_m) == (1300 * 3 * 32 * 2, None)


@pytest.mark.parametrize(
    "spec",
    [
        TableSpec(dtype="int8", group_size=20, symmetric=False, layers=[0, 2]),
        TableSpec(dtype="int4", group_size=8, rank=9),
        TableSpec(dtype="bfloat16", rank=11),
    ],
)
def test_encoded(exported: Path, ray: None, tmp_path: Path, spec: TableSpec) -> None:
    folder = tmp_path / "tol"
    index = Build(exported, folder, spec, partitions=3, chunk_rows=50).run()
    found = inspect_tol(folder, exported, top=5, neighbours=["17", "600"])
    table = TableReader.open_folder(folder)
    stored = [table.values(table.range(0, 601), layer) for layer in index.layers]
    check(found, [values.double() for values in stored if values is not None], top=5)
    assert [one.error for one in found.layers] == index.errors and None not in (index.errors or [None])
    for one in found.layers:
        assert (one.dtype, one.rank, one.group_size) == (spec.dtype, spec.rank, spec.group_size)
        assert len(one.singular_values) == (spec.rank or 32)
        assert one.bytes == 601 * one.row_bytes + (spec.rank or 0) * 32 * 2
    headers = sum(file.bytes for file in index.partitions) - 601 * index.row_bytes
    if index.basis is not None:
        headers += index.basis.bytes - 3 * (spec.rank or 0) * 32 * 2
    assert found.sizes.other == headers == found.sizes.bytes - sum(one.bytes for one in found.layers)
    assert found.sizes.ffn_m == 3 * (3 * 32 * 44 + 32) * 2


def test_rows_of_zeros_make_no_pairs(tmp_path: Path) -> None:
    """As in padded vocabularies: their cosines are left out, and a layer of zeros has rank 0."""
    rows = alike(700)
    rows[:, 1] = 0
    rows[5], rows[600:] = 0, 0
    found = inspect_tol(write(tmp_path / "tol", rows), top=3)
    kept = torch.cat([rows[:5, 0], rows[6:600, 0]]).double()
    unit = kept / kept.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    consecutive = cosines.diagonal(1)[torch.arange(598) != 4].mean()
    assert found.likeness.consecutive == pytest.approx(float(consecutive), rel=1e-4)
    random = (cosines.sum() - 599) / (599 * 598)
    assert found.likeness.random == pytest.approx(float(random), rel=1e-4, abs=1e-6)
    assert found.layers[1].ranks == {"90%": 0, "99%": 0, "99.9%": 0} and found.layers[1].stable_rank == 0
    assert [token.id for token in found.layers[1].largest] == [0, 1, 2]
    with pytest.raises(UserError, match="token 5 has a row of zeros"):
        inspect_tol(tmp_path / "tol", neighbours=["4", "5"])
    mlm_train("tol", "inspect", tmp_path / "tol", "--plot", tmp_path / "zeros.png")


def test_one_token(tmp_path: Path) -> None:
    index = json.loads((write(tmp_path / "two", alike(3)) / INDEX).read_text())
    index |= {"vocab_size": 1, "partitions": index["partitions"][:1], "digest": None}
    (tmp_path / "two" / INDEX).write_text(json.dumps(index))
    found = inspect_tol(tmp_path / "two", neighbours=["0"])
    assert (found.likeness.consecutive, found.likeness.random, found.likeness.change) == (None, None, None)
    assert found.neighbours[0].nearest == [] and [token.id for token in found.largest] == [0]
    mlm_train("tol", "inspect", tmp_path / "two")


@pytest.fixture(scope="module")
def with_text(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A table and its model, whose folder has a tokenizer that knows 512 of 520 tokens."""
    root = tmp_path_factory.mktemp("text")
    model = random_model(vocab_size=520)
    write_folder(root / "model", model.config, named_pieces(model), [data / "tokenizer.model"])
    return write(root / "tol", alike(520)), root / "model"


def test_tokens_as_text(with_text: tuple[Path, Path]) -> None:
    folder, model = with_text
    tokenizer = tokenizer_of(model)
    (word,) = tokenizer.encode(" self")
    found = inspect_tol(folder, model, top=519, neighbours=[" self", "515"])
    assert [(asked.id, asked.text) for asked in found.neighbours] == [(word, " self"), (515, None)]
    for token in found.largest:
        if token.id >= 512:
            assert token.text is None
        elif token.text and "\N{REPLACEMENT CHARACTER}" not in token.text:
            assert tokenizer.decode(tokenizer.encode(f"x{token.text}")) == f"x{token.text}"
    assert sum(bool(token.text and token.text.startswith(" ")) for token in found.largest) > 20


def test_command(with_text: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = with_text
    arguments = ("tol", "inspect", folder, "--model", model, "--top", 4, "--neighbours", " self", 9)
    mlm_train(*arguments, "--json", "--plot", tmp_path / "plot.png")
    expected = inspect_tol(folder, model, 4, [" self", "9"])
    assert json.loads(capsys.readouterr().out) == asdict(expected)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    mlm_train(*arguments)
    shown = capsys.readouterr().out
    for part in (
        "520 rows of 2 of 3 layers x 32",
        f"{expected.layers[1].stable_rank:.1f}",
        f"of tokens t and t + 1: {expected.likeness.consecutive:.4f}",
        f"nearest to {expected.neighbours[0].id} ' self': {expected.neighbours[0].nearest[0].id} ",
    ):
        assert part in shown


def test_a_plot_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the earlier one stays, and no draft of the new one is left."""
    folder, file = write(tmp_path / "tol", alike(20)), tmp_path / "plot.png"
    mlm_train("tol", "inspect", folder, "--plot", file)
    before = file.read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync", full)
        line = refused("tol", "inspect", folder, "--plot", file)
    assert f"{file} cannot be written: No space left" in line
    assert file.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"tol", "plot.png"}
    mlm_train("tol", "inspect", folder, "--plot", file)


def test_bad_input(with_text: tuple[Path, Path], tmp_path: Path) -> None:
    folder, model = with_text
    thin = export(tmp_path / "thin", random_model(vocab_size=520, hidden_size=16))
    base = export(tmp_path / "base", random_model(vocab_size=520, kind="base"))
    infinite = alike(600)
    infinite[550, 1, 3] = torch.inf
    damaged = write(tmp_path / "damaged", infinite)
    short = write(tmp_path / "short", alike(30))
    (short / "rows-10.safetensors").write_bytes(b"short")
    (tmp_path / "mine.json").write_text("{}")
    for arguments, message in (
        ((tmp_path / "none",), "tol.index.json does not exist"),
        ((model,), "tol.index.json does not exist"),
        ((damaged,), "rows [512, 600) have NaN, infinite or huge values"),
        ((short,), "(rows [10, 30)) is damaged"),
        ((folder, "--model", thin), "hidden_size=32 and the model 16"),
        ((folder, "--model", base), "base model"),
        ((folder, "--model", tmp_path / "none"), "is not a folder; give an export, a run's folder"),
        ((folder, "--top", 0), "--top 0: give at least 1"),
        ((folder, "--neighbours", 520), "--neighbours 520: there is no such token; give 0 to 519"),
        ((folder, "--neighbours", "self"), "'self': give ids, or a --model"),
        ((folder, "--model", model, "--neighbours", "self self"), "tokens ("),
        ((folder, "--model", model, "--neighbours", ""), "is 0 tokens"),
        ((folder, "--plot", tmp_path / "none" / "p.png"), "name a file in a folder that exists"),
        ((folder, "--plot", ""), "--plot '': name a file"),
        ((folder, "--plot", folder / INDEX), f"is in the folder of {folder / INDEX}"),
        ((folder, "--plot", model / "p.png"), "which must hold no other files"),
        ((folder, "--plot", tmp_path / "mine.json"), "mine.json exists and is not a PNG"),
    ):
        assert message in refused("tol", "inspect", *arguments)
