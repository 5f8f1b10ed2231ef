"""A budget of bytes: the chosen table has the least error within it, compared with all others."""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlm_train.tol.build.budget import lay_out
from mlm_train.tol.build.state import BuildPlan
from mlm_train.tol.format.index import INDEX, TolIndex
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.format.layout import Layout, TableSpec
from mlm_train.tol.lowrank.knapsack import LayerOptions, best_mix
from mlm_train.tol.serve.reader import write_bases
from mlm_train.tol.storage.local import LocalFolder
from tests.commands import mlm_train, refused
from tests.tol.built import build_tol
from tests.tol.conftest import export, random_model
from tests.tol.test_compress import stored_rows

ROWS, HIDDEN = 4096, 96


def random_layers(random: np.random.Generator) -> list[LayerOptions]:
    """A few layers with a few options; the first is to drop it."""
    layers = []
    for _ in range(random.integers(1, 5)):
        count = random.integers(1, 9)
        costs = np.round(random.random(count) ** 3, random.choice([1, 9]))  # ties, or none
        costs[random.random(count) < 0.1] = np.inf
        sizes = random.integers(1, 200, count)
        layers.append(LayerOptions(np.array([0, *sizes]), np.array([1.0, *costs])))
    return layers


def test_the_best_mix_is_the_best_of_all() -> None:
    random = np.random.default_rng(seed := np.random.SeedSequence().entropy)
    print("seed", seed)
    for _ in range(100):
        layers = random_layers(random)
        mixes = list(itertools.product(*(range(len(layer.bytes)) for layer in layers)))
        totals = np.array([
            [sum(layer[part][pick] for layer, pick in zip(layers, mix, strict=True)) for part in (0, 1)]
            for mix in mixes
        ])  # fmt: skip
        before = np.inf
        for budget in (0, *sorted(random.integers(0, 500, 5).tolist()), 10**9):
            best = totals[totals[:, 0] <= budget]
            mix = best_mix(layers, budget)
            assert mix is not None and mix.gap == 0
            assert (mix.bytes, mix.cost) == pytest.approx(totals[mixes.index(mix.picks)], rel=1e-12)
            assert mix.bytes <= budget and mix.cost == pytest.approx(best[:, 1].min(), rel=1e-12)
            assert mix.cost <= before  # more bytes, no more error
            before = mix.cost
    assert best_mix([LayerOptions(np.array([3]), np.array([1.0]))], 2) is None
    assert best_mix([LayerOptions(np.array([3]), np.array([np.inf]))], 5) is None


def large_layers(layers: int, hidden: int, rows: int) -> list[LayerOptions]:
    """As many options as a budget leaves open: 19 types and groups, every rank; spectra of various decay."""
    random, options = np.random.default_rng(3), []
    schemes, ranks = TableSpec(dtype=None, budget=1).searched, np.arange(1, hidden + 1)
    for _ in range(layers):
        energies = 10 ** np.linspace(0, -random.uniform(1, 5), hidden) * (1 + random.random(hidden))
        left = np.append(np.sort(energies).cumsum()[::-1][1:], 0.0) / energies.sum()
        sizes, costs = [np.zeros(1, dtype=np.int64)], [np.ones(1)]
        for number, scheme in enumerate(schemes):
            item = {"float32": 4.0, "int8": 1.0, "int4": 0.5}.get(scheme.dtype, 2.0)
            shared = 0 if scheme.group_size is None else 2 * -(-ranks // scheme.group_size)
            row = -(-(np.ceil(ranks * item) + shared) // 16) * 16
            sizes.append((rows * row + 2 * hidden * ranks + 128).astype(np.int64))
            costs.append(left + 10.0 ** -(7 - number / 4) * (1 - left) * (1 + 0.1 * random.random(hidden)))
        options.append(LayerOptions(np.concatenate(sizes), np.concatenate(costs)))
    return options


@pytest.mark.parametrize(("layers", "hidden", "share"), [(24, 2048, 0.2), (80, 8192, 0.3)])
def test_tables_of_any_size_are_chosen_in_seconds(layers: int, hidden: int, share: float) -> None:
    """To the optimum, or with a small known gap."""
    options = large_layers(layers, hidden, 128_256)
    started = time.process_time()
    mix = best_mix(options, budget := int(layers * hidden * 128_256 * share))
    print("seconds", time.process_time() - started, mix and mix.gap)
    assert mix is not None and mix.bytes <= budget and time.process_time() < started + 60
    assert 0 <= mix.gap <= 1e-3 * mix.cost


def test_a_gap_is_reported_if_too_many_pairs_come_up() -> None:
    """Random bytes and costs that are linear in them: all pairs are Pareto-optimal."""
    random = np.random.default_rng(1)
    layers = []
    for _ in range(40):
        sizes = np.sort(random.integers(1, 10**12, 30))
        layers.append(LayerOptions(np.append(0, sizes), np.append(1.0, 1 - sizes / 2e12)))
    mix = best_mix(layers, 10**13)
    assert mix is not None and mix.bytes <= 10**13
    assert 0 <= mix.gap <= 1e-3 * mix.cost


def every_table(plan: BuildPlan, errors: Sequence[Tensor]) -> Iterator[tuple[Layout, float]]:
    """All layouts that keep a layer, and the sums of their layers' errors."""
    hidden, schemes = plan.hidden_size, plan.spec.searched
    options = [
        (scheme.model_copy(update={"rank": None if column == hidden else column + 1}), (number, column))
        for number, scheme in enumerate(schemes)
        for column in range(hidden + 1)
    ]
    for mix in itertools.product([None, *options], repeat=plan.num_layers):
        kept = {layer: option[0] for layer, option in enumerate(mix) if option is not None}
        pairs = zip(errors, mix, strict=True)
        lost = sum(1.0 if option is None else float(error[option[1]]) for error, option in pairs)
        if kept:
            yield Layout(hidden_size=hidden, layers=list(kept), schemes=list(kept.values())), lost


def written_bytes(plan: BuildPlan, layout: Layout, folder: Path) -> int:
    """Bytes of the files that a build would write, by writing the basis and the headers."""
    rows = [stop - start for start, stop in map(plan.rows, range(plan.partitions))]
    size = sum(len(layout.shape.header(count)) + count * layout.shape.size for count in rows)
    ranks = {layer: one.rank for layer, one in zip(layout.layers, layout.schemes, strict=True) if one.rank}
    if ranks:
        bases = {layer: torch.zeros(rank, plan.hidden_size) for layer, rank in ranks.items()}
        file = write_bases(LocalFolder(folder), bases)
        assert file.bytes == (folder / file.file).stat().st_size
        size += file.bytes
    return size


@pytest.mark.parametrize(
    "spec",
    [
        TableSpec(dtype="float16", budget=1),
        TableSpec(dtype="int8", group_size=2, symmetric=False, budget=1),
        TableSpec(dtype=None, group_size=3, budget=1),
    ],
)
def test_the_table_is_the_best_of_all_tables(spec: TableSpec, tmp_path: Path) -> None:
    """Two layers of five values, each padded to 16 bytes unless all are uncut in one plain type."""
    random = torch.Generator().manual_seed(7)
    given = {"checkpoint": "", "vocab_size": 40, "num_layers": 2, "hidden_size": 5, "partitions": 2}
    plan = BuildPlan(**given, compute="float32", chunk_rows=10, threads=1, spec=spec)
    shape = (len(spec.searched), 6)
    errors = [torch.rand(shape, generator=random, dtype=torch.float64) ** 2 for _ in range(2)]
    tables = [(*one, written_bytes(plan, one[0], tmp_path)) for one in every_table(plan, errors)]
    before = np.inf
    for budget in (*range(min(size for _, _, size in tables), 10_600, 40), 10**6):
        plan = plan.model_copy(update={"spec": spec.model_copy(update={"budget": budget})})
        layout = lay_out(plan, errors)
        (found,) = (one for one in tables if one[0] == layout)
        assert found[2] <= budget and found[1] <= before
        assert found[1] == pytest.approx(min(lost for _, lost, size in tables if size <= budget), rel=1e-12)
        before = found[1]


@pytest.fixture(scope="module")
def table(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of 96 values, whose singular values decay like those of trained ones."""
    root = tmp_path_factory.mktemp("budget")
    model = random_model(vocab_size=ROWS, hidden_size=HIDDEN, intermediate_size=128)
    for layer, block in model.memory_blocks().items():
        block.memory_mlp.down_proj.weight.mul_(torch.logspace(0, -1 - layer / 4, HIDDEN).unsqueeze(1))
    build_tol(export(root / "model", model), root / "tol")
    return root / "tol"


def compressed(table: Path, output: Path, *arguments: object) -> tuple[TolIndex, float]:
    """A compressed table's index, and the sum of squared relative errors measured from its rows."""
    mlm_train("tol", "compress", table, "--output", output, *arguments)
    index, true, found = read_index(output), stored_rows(table), stored_rows(output)
    files = [path for path in output.iterdir() if path.name != INDEX]
    assert sum(path.stat().st_size for path in files) == index.bytes
    errors = [
        float(((found.get(layer, 0 * rows) - rows).norm() / rows.norm()).square())
        for layer, rows in true.items()
    ]
    return index, sum(errors)


@pytest.mark.long
def test_no_layer_is_dropped_where_a_better_table_fits(
    table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error is no larger than that of any more constrained table of the same size."""
    budget = 600_000
    rank, of_rank = compressed(table, tmp_path / "rank", "--dtype", "int8", "--rank", 30)
    assert rank.bytes < budget
    found: dict[str, float] = {}
    for name, fixed in {
        "int8": ("--dtype", "int8"),
        "int8 by 16": ("--dtype", "int8", "--group-size", 16),
        "bfloat16": ("--dtype", "bfloat16"),
        "open": (),
    }.items():
        index, found[name] = compressed(table, tmp_path / name, *fixed, "--budget", budget)
        assert 0.9 * budget < index.bytes <= budget and index.layers == [0, 1, 2]
        assert name == "open" or index.dtype == name.split()[0]
    assert index.bytes <= budget
    assert found["int8"] < of_rank and found["int8"] <= 1.01 * found["int8 by 16"]
    assert found["open"] <= 1.01 * min(*found.values(), of_rank)
    assert "warning" not in capfd.readouterr().err


def test_a_dropped_layer_gives_a_warning(
    table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """If only one layer fits, the most valuable one is kept; smaller budgets are rejected."""
    arguments = ("--dtype", "float32", "--partitions", 1)
    one = 4096 + 16 * ROWS + 128 + 2 * HIDDEN  # a layer of rank 1, padded to 16 bytes per row
    index, _ = compressed(table, tmp_path / "one", *arguments, "--budget", one + 16 * ROWS)
    (warned,) = (line for line in capfd.readouterr().err.splitlines() if "warning" in line)
    (kept,) = index.layers
    dropped = sorted({0, 1, 2} - {kept})
    assert f" {dropped[0]}, {dropped[1]} dropped" in warned
    mlm_train("tol", "inspect", tmp_path / "one")
    assert f"dropped layers, read as 0: {dropped[0]}, {dropped[1]}" in capfd.readouterr().out
    assert "is too small for any layer" in refused(
        "tol", "compress", table, "--output", tmp_path / "none", *arguments, "--budget", one - 1
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.long
def test_any_number_of_workers_chooses_the_same(table: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        arguments = ("--budget", 500_000, "--workers", workers)
        mlm_train("tol", "compress", table, "--output", tmp_path / str(workers), *arguments)
    one, two = (read_index(tmp_path / str(workers)) for workers in (1, 2))
    assert one.files == two.files and one.encodings == two.encodings and one.errors == two.errors
