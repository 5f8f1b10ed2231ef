"""Choosing how each layer is stored: the best mixes are optimal, and a trained model gains by them."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mlm_train.parallel import runtime
from mlm_train.tol.allocate.mixes import best_mixes, choices
from mlm_train.tol.allocate.sensitivity import Notes, Trial, measure, spectra_of
from mlm_train.tol.build.budget import bytes_of
from mlm_train.tol.build.builder import Build
from mlm_train.tol.commands import allocate as allocate_command
from mlm_train.tol.format.index import INDEX
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.schemes import Scheme
from mlm_train.tol.lowrank.knapsack import LayerOptions
from mlm_train.tol.serve.reader import TableReader
from mlm_train.tol.serve.source import TolSource
from tests.commands import TINY, mlm_train, refused
from tests.tol.conftest import export, random_model
from tests.tol.test_inspect import alike, write

OPTIONS = [
    None,
    Scheme(dtype="bfloat16"),
    Scheme(dtype="int4", group_size=8),
    Scheme(dtype="int8", group_size=8, rank=16),
]


@pytest.mark.parametrize("seed", range(5))
def test_best_mixes_against_all_mixes(seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = random.random((4, 5)) ** 3
    sizes = np.array([0, *random.integers(1, 1000, 4)])
    front = best_mixes([LayerOptions(sizes, each) for each in costs])
    mixes = [
        (sizes[list(picks)].sum(), costs[range(4), picks].sum())
        for picks in itertools.product(range(5), repeat=4)
    ]
    for mix in front:
        assert mix.bytes == sizes[list(mix.picks)].sum()
        best = min(cost for size, cost in mixes if size <= mix.bytes)
        assert mix.cost == pytest.approx(costs[range(4), list(mix.picks)].sum()) == pytest.approx(best)
    assert front[-1].cost == pytest.approx(costs.min(axis=1).sum())
    assert [mix.bytes for mix in front] == sorted(mix.bytes for mix in front)
    assert [mix.cost for mix in front] == sorted((mix.cost for mix in front), reverse=True)


def test_a_trial_reads_what_the_table_would(
    ray: None, exported: Path, tables: dict[str, Path], tmp_path: Path
) -> None:
    """Layer 1 by each option: equal to a table that was compressed so."""
    ids = torch.arange(60).view(2, 30) ** 2 % 601
    model = random_model()
    x0 = model.embed_tokens(ids)
    table = TableReader.open_folder(tables["float32"])
    trial = Trial(table, spectra_of(table))
    exact = TolSource.open_folder(tables["float32"], model.config).open(ids, x0)
    assert torch.equal(trial.open(ids, x0)(1), exact(1))
    for number, option in enumerate(OPTIONS):
        trial.chosen = {1: option}
        kept = [0, 2] if option is None else [0, 1, 2]
        whole = Scheme(dtype="float32")
        spec = TableSpec(layers=kept, schemes=[option if layer == 1 and option else whole for layer in kept])
        folder = tmp_path / str(number)
        Build(None, folder, spec, table=tables["float32"], partitions=2).run()
        stored = TolSource.open_folder(folder, model.config).open(ids, x0)
        read = trial.open(ids, x0)
        for layer in range(3):
            assert torch.allclose(
                read(layer), stored(layer), rtol=1e-3, atol=1e-3 * float(exact(layer).abs().max())
            )
        if option is not None:
            data = sum(partition.bytes for partition in read_index(folder).partitions) - 2 * 4096
            basis = 128 + 2 * 32 * option.rank if option.rank else 0
            assert data == bytes_of(option, 601, 32) - basis + 601 * 2 * 32 * 4


def test_sensitivities(tables: dict[str, Path]) -> None:
    model = random_model()
    table = TableReader.open_folder(tables["float32"])
    trial = Trial(table, spectra_of(table))
    ids = torch.randint(601, (3, 4, 20), generator=torch.Generator().manual_seed(5))
    batches = [(one, one.roll(-1, 1)) for one in ids]
    costs = measure(model, trial, batches, OPTIONS)
    assert costs.shape == (3, 4) and (costs >= 0).all()
    assert (costs[:, 0] > costs[:, 2]).all() and (costs[:, 2] > costs[:, 1]).all()
    # One cell by hand: layer 2 dropped.
    trial.chosen = {}
    with torch.no_grad():
        before = [model(one, trial).double().log_softmax(-1) for one, _ in batches]
        trial.chosen = {2: None}
        after = [model(one, trial).double().log_softmax(-1) for one, _ in batches]
    divergence = sum(float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True))
    loss = sum(
        float((b - a).gather(-1, labels.unsqueeze(-1)).sum())
        for (_, labels), b, a in zip(batches, before, after, strict=True)
    )
    assert costs[2, 0] == pytest.approx(max(divergence, loss) / ids.numel(), rel=1e-4)


def test_a_killed_study_is_resumed(tables: dict[str, Path], tmp_path: Path) -> None:
    model, table = random_model(), TableReader.open_folder(tables["float32"])
    trial = Trial(table, spectra_of(table))
    ids = torch.randint(601, (3, 4, 20), generator=torch.Generator().manual_seed(5))
    batches = [(one, one.roll(-1, 1)) for one in ids]
    unbroken = measure(model, trial, batches, OPTIONS)
    notes = Notes(tmp_path / "mix.json", ["about", 1])

    def killed(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            if step == 7:  # within the third batch of three layers each
                raise KeyboardInterrupt
            yield step

    with pytest.raises(KeyboardInterrupt):
        measure(model, trial, batches, OPTIONS, killed, notes)
    seen: list[int] = []

    def watched(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            seen.append(step)
            yield step

    others = Notes(tmp_path / "mix.json", ["about", 2])
    assert others.read() is None and (kept := notes.read()) is not None and kept.batches == 2
    again = measure(model, trial, batches, OPTIONS, watched, notes)
    assert seen == [6, 7, 8] and np.array_equal(again, unbroken)
    notes.path.write_text(notes.path.read_text()[:-5])
    assert notes.read() is None
    notes.remove()
    assert not list(tmp_path.iterdir())


def test_choices_fit_small_and_large_layers() -> None:
    for hidden in (32, 192, 2048):
        options = choices(hidden)
        assert None in options and len(options) == len(set(options))
        assert all(choice is None or choice.rank is None or choice.rank < hidden for choice in options)


@pytest.fixture(scope="module")
def trained(data: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The export of a briefly trained small model, and its table."""
    root = tmp_path_factory.mktemp("allocate")
    arguments = (
        *TINY,
        f"data.path={data}",
        f"train.output={root / 'run'}",
        "train.steps=60",
        "optimizer.lr=3e-3",
    )
    mlm_train("pretrain", "configs/micro.yaml", *arguments)
    runtime.stop()
    mlm_train("export", root / "run", "--output", root / "export")
    mlm_train("tol", "build", root / "export", "--output", root / "tol", "--dtype", "float32")
    return root / "export", root / "tol"


def test_a_mix_for_a_trained_model(
    trained: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, table = trained
    text = ("--model", export, "--data", data, "--samples", 16)
    out = ("--output", tmp_path / "mix.json", "--plot", tmp_path / "mix.png")
    layer = bytes_of(Scheme(dtype="int4", group_size=64), 512, 32)
    budget = 2 * layer + 8 * 4096  # a header in each of its partitions
    (tmp_path / "mix.json").touch()  # an empty file may be replaced
    mlm_train("tol", "allocate", table, *text, "--budget", budget, *out)
    tree = json.loads((tmp_path / "mix.json").read_text())
    assert tree["bytes"] <= budget and (tmp_path / "mix.png").read_bytes()[:4] == b"\x89PNG"
    measured = tree["measured"]
    uniform = [one for name, one in measured.items() if name != "chosen" and one["bytes"] <= budget]
    assert len(uniform) >= 2  # int4 and low rank
    assert all(measured["chosen"]["perplexity"] <= 1.0005 * one["perplexity"] for one in uniform)

    capsys.readouterr()
    arguments = ("--allocation", tmp_path / "mix.json", "--evaluate", data, "--model", export)
    mlm_train("tol", "compress", table, "--output", tmp_path / "small", *arguments)
    chosen = measured["chosen"]
    expected = f"{chosen['perplexity']:.4f} with {tmp_path / 'small'}: {chosen['growth']:+.3%}"
    assert expected in capsys.readouterr().out
    assert read_index(tmp_path / "small").bytes == tree["bytes"] <= budget

    # Its own earlier result is replaced.
    mlm_train("tol", "allocate", table, *text, "--tolerance", "2%", *out)
    assert json.loads((tmp_path / "mix.json").read_text())["measured"]["chosen"]["growth"] <= 0.02

    # With any tolerance a layer is kept.
    mlm_train("tol", "allocate", table, *text, "--tolerance", "999%", *out)
    assert len(json.loads((tmp_path / "mix.json").read_text())["layers"]) == 1


def test_remarks() -> None:
    def table(size: int, growth: float) -> dict[str, float]:
        return {"bytes": size, "perplexity": 10 * (1 + growth), "growth": growth}

    measured = {"chosen": table(100, 0.02), "larger": table(101, 0.01), "worse": table(90, 0.03)}
    assert allocate_command._remarks(measured, 0.03) == allocate_command._remarks(measured, None) == []
    (line,) = allocate_command._remarks(measured | {"int8": table(100, 0.01)}, None)
    assert line.startswith("measured better in no more bytes: int8 (+1.000%, the chosen mix +2.000%)")
    (line,) = allocate_command._remarks(measured, 0.01)
    assert line.startswith("no mix stays within 1.000%")


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A table that no command may write into, and its index file."""
    folder = tmp_path_factory.mktemp("refusing") / "tol"
    write(folder, alike(30))
    return folder, folder / INDEX


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", ""), "--output '': name a file in a folder that exists"),
        (("--output", "no/mix.json"), "no/mix.json: name a file in a folder that exists"),
        (("--output", "."), "--output .: name a file"),
        (("--output", "TABLE/tol.index.json"), "tol.index.json is in the folder of"),
        (("--output", "TABLE/new.json"), "which must hold no other files"),
        (("--output", "mine.json"), "mine.json exists and is not a file of `tol allocate`"),
        (("--output", "/dev/null"), "/dev/null exists and is not a file of"),
        (("--output", "o" * 252), "cannot be written: File name too long"),
        (("--output", "mix.json", "--plot", "no/x.png"), "--plot no/x.png: name a file"),
        (("--output", "mix.json", "--plot", "mine.json"), "mine.json exists and is not a PNG"),
        (("--output", "mix.json", "--plot", "./mix.json"), "is --output too"),
        (("--output", "mix.json", "--budget", "30kB"), "is too small for any layer; give at least"),
        (("--output", "mix.json", "--tolerance", "5"), "--tolerance 5 is 500%: write 5%"),
        (("--output", "mix.json", "--tolerance", "nan"), "give a fraction such as 0.5%"),
    ],
)
def test_rejected_before_a_model_is_opened(
    refusing: tuple[Path, Path],
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model and the data do not exist."""
    table, index = refusing
    before = index.read_bytes()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{"layers": [0]}')
    arguments = tuple(argument.replace("TABLE", str(table)) for argument in arguments)
    goal = () if {"--budget", "--tolerance"} & set(arguments) else ("--budget", "1MB")
    assert message in refused(
        "tol", "allocate", table, "--model", "none", "--data", "none", *goal, *arguments
    )
    assert index.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"mine.json"}
    assert (tmp_path / "mine.json").read_text() == '{"layers": [0]}'


def test_data_with_more_ids_than_the_model(data: Path, refusing: tuple[Path, Path], tmp_path: Path) -> None:
    """Rejected, as in pretraining; fewer ids are allowed, since a vocabulary may be padded."""
    model, (table, _) = export(tmp_path / "model", random_model(vocab_size=300)), refusing
    evaluated = ("--dtype", "int8", "--evaluate", data, "--output", tmp_path / "out")
    for arguments in (
        ("evaluate", "--data", data),
        ("tol", "allocate", table, "--data", data, "--budget", "1MB", "--output", tmp_path / "mix.json"),
        ("tol", "compress", table, *evaluated),
    ):
        assert f"{data} has 512 ids, but {model} has 300: prepare" in refused(*arguments, "--model", model)
    assert not (tmp_path / "out").exists() and not (tmp_path / "mix.json").exists()


def test_bad_input(trained: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    export, table = trained
    arguments = (
        "tol",
        "allocate",
        table,
        "--model",
        export,
        "--data",
        data,
        "--output",
        tmp_path / "mix.json",
        "--samples",
        2,
    )
    assert "give --budget or --tolerance" in refused(*arguments)
    assert "--tolerance much: give a fraction" in refused(*arguments, "--tolerance", "much")
    assert "--budget 10 bytes is too small for any layer; give at least" in refused(
        *arguments, "--budget", 10
    )
    mlm_train("tol", "compress", table, "--output", tmp_path / "int8", "--dtype", "int8")
    again = ("tol", "allocate", tmp_path / "int8", *arguments[3:], "--budget", "1MB")
    assert "is compressed already" in refused(*again)
    assert "--evaluate needs --model" in refused(
        "tol", "compress", table, "--output", tmp_path / "x", "--dtype", "int8", "--evaluate", data
    )
    assert not (tmp_path / "mix.json").exists() and not (tmp_path / "x").exists()
