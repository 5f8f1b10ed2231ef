"""Choosing how each layer is stored: the best mixes are the best, and a trained model gains by them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mlm_train.parallel import runtime
from mlm_train.tol.allocate import Trial, best_mixes, bytes_of, choices, measure, spectra_of, within
from mlm_train.tol.build import Build
from mlm_train.tol.codec import Scheme
from mlm_train.tol.format import read_index
from mlm_train.tol.state import Storage
from mlm_train.tol.store import TolSource
from mlm_train.tol.table import Table
from tests.commands import TINY, mlm_train, refused
from tests.tol.conftest import random_model

OPTIONS = [
    None,
    Scheme(dtype="bfloat16"),
    Scheme(dtype="int4", group_size=8),
    Scheme(dtype="int8", group_size=8, rank=16),
]


@pytest.mark.parametrize("seed", range(5))
def test_best_mixes_against_all_mixes(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    costs = numbers.random((4, 5)) ** 3
    sizes = np.array([0, *numbers.integers(1, 1000, 4)])
    front = best_mixes(costs, sizes)
    found = [
        (sizes[list(picks)].sum(), costs[range(4), picks].sum())
        for picks in itertools.product(range(5), repeat=4)
    ]
    for mix in front:
        assert mix.bytes == sizes[list(mix.picks)].sum()
        assert mix.cost == pytest.approx(costs[range(4), list(mix.picks)].sum())
    slack = 4 * 4 * sizes.max() / 8192 + 4  # a size is rounded up
    for budget in numbers.integers(0, 4 * sizes.max(), 20):
        mix = within(front, int(budget))
        assert mix is not None and mix.bytes <= budget
        best = min(cost for size, cost in found if size <= budget - slack) if budget > slack else np.inf
        assert mix.cost <= best + 1e-9
    assert [mix.bytes for mix in front] == sorted(mix.bytes for mix in front)
    assert [mix.cost for mix in front] == sorted((mix.cost for mix in front), reverse=True)


def test_a_trial_is_what_the_table_would_be(
    ray: None, exported: Path, tables: dict[str, Path], tmp_path: Path
) -> None:
    """Layer 1 in each way: as if a table had been compressed so."""
    ids = torch.arange(60).view(2, 30) ** 2 % 601
    model = random_model()
    x0 = model.embed_tokens(ids)
    table = Table.open_folder(tables["float32"])
    trial = Trial(table, spectra_of(table))
    exact = TolSource(table).open(ids, x0)
    assert torch.equal(trial.open(ids, x0)(1), exact(1))
    for number, option in enumerate(OPTIONS):
        trial.chosen = {1: option}
        kept = [0, 2] if option is None else [0, 1, 2]
        whole = Scheme(dtype="float32")
        storage = Storage(layers=kept, schemes=[option if layer == 1 and option else whole for layer in kept])
        folder = tmp_path / str(number)
        Build(None, folder, storage, table=tables["float32"], partitions=2).run()
        stored = TolSource.open_folder(folder, model.config).open(ids, x0)
        read = trial.open(ids, x0)
        for layer in range(3):
            assert torch.allclose(
                read(layer), stored(layer), rtol=1e-3, atol=1e-3 * float(exact(layer).abs().max())
            )
        if option is not None:
            data = sum(partition.bytes for partition in read_index(folder).partitions) - 2 * 4096
            expected = bytes_of(option, 601, 32) - 2 * 32 * (option.rank or 0) + 601 * 2 * 32 * 4
            assert data == expected


def test_sensitivities(tables: dict[str, Path]) -> None:
    model = random_model()
    table = Table.open_folder(tables["float32"])
    trial = Trial(table, spectra_of(table))
    ids = torch.randint(601, (3, 4, 20), generator=torch.Generator().manual_seed(5))
    batches = [(one, one.roll(-1, 1)) for one in ids]
    costs = measure(model, trial, batches, OPTIONS)
    assert costs.shape == (3, 4) and (costs >= 0).all()
    assert (costs[:, 0] > costs[:, 2]).all() and (costs[:, 2] > costs[:, 1]).all()
    # By hand, of one cell: layer 2 dropped.
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


def test_choices_fit_small_and_large_layers() -> None:
    for hidden in (32, 192, 2048):
        found = choices(hidden)
        assert None in found and len(found) == len(set(found))
        assert all(one is None or one.rank is None or one.rank < hidden for one in found)


@pytest.fixture(scope="module")
def trained(data: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model that has learnt something, as an export, and its table."""
    root = tmp_path_factory.mktemp("allocate")
    words = (
        *TINY,
        f"data.path={data}",
        f"train.output={root / 'run'}",
        "train.steps=60",
        "optimizer.lr=3e-3",
    )
    mlm_train("pretrain", "configs/micro.yaml", *words)
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
    budget = 2 * bytes_of(Scheme(dtype="int4", group_size=64), 512, 32)
    mlm_train("tol", "allocate", table, *text, "--budget", budget, *out)
    tree = json.loads((tmp_path / "mix.json").read_text())
    assert tree["bytes"] <= budget and (tmp_path / "mix.png").read_bytes()[:4] == b"\x89PNG"
    ways = tree["measured"]
    uniform = [way for name, way in ways.items() if name != "chosen" and way["bytes"] <= budget]
    assert len(uniform) >= 2  # int4 and low rank
    assert all(ways["chosen"]["perplexity"] <= 1.0005 * way["perplexity"] for way in uniform)

    capsys.readouterr()
    words = ("--allocation", tmp_path / "mix.json", "--evaluate", data, "--model", export)
    mlm_train("tol", "compress", table, "--output", tmp_path / "small", *words)
    said = capsys.readouterr().out
    assert (
        f"{ways['chosen']['perplexity']:.4f} with {tmp_path / 'small'}: {ways['chosen']['growth']:+.3%}"
        in said
    )
    index = read_index(tmp_path / "small")
    assert index.bytes - len(index.partitions) * 4096 <= tree["bytes"] + 2000

    mlm_train("tol", "allocate", table, *text, "--tolerance", "2%", "--output", tmp_path / "two.json")
    assert json.loads((tmp_path / "two.json").read_text())["measured"]["chosen"]["growth"] <= 0.02


def test_bad_input(trained: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    export, table = trained
    words = (
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
    assert "give --budget or --tolerance" in refused(*words)
    assert "--tolerance much: give a share" in refused(*words, "--tolerance", "much")
    assert "--budget 10 bytes holds no layer; the smallest mix takes" in refused(*words, "--budget", 10)
    mlm_train("tol", "compress", table, "--output", tmp_path / "int8", "--dtype", "int8")
    again = ("tol", "allocate", tmp_path / "int8", *words[3:], "--budget", "1MB")
    assert "is compressed already" in refused(*again)
    assert "--evaluate needs --model" in refused(
        "tol", "compress", table, "--output", tmp_path / "x", "--dtype", "int8", "--evaluate", data
    )
    assert not (tmp_path / "mix.json").exists() and not (tmp_path / "x").exists()
