"""The store of rows: every tier gives the same bytes, counts them, and says what cannot be read."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlm_train.bench.random_table import write_random_table
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.tol.format.index import TolIndex
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.format.schemes import Scheme
from mlm_train.tol.serve import disk, layers, parts
from mlm_train.tol.serve.reader import TableReader
from mlm_train.tol.serve.source import TolSource, open_store
from mlm_train.tol.serve.store import RowStore, StoreOptions
from tests.partitions import random_table

VOCABULARY, LAYERS = 700, 5
OPTIONS = {
    "resident": StoreOptions("resident"),
    "shared": StoreOptions("shared"),
    "locked": StoreOptions("shared", lock=True, first_touch=True),
    "disk": StoreOptions("disk", depth=3),
    "direct": StoreOptions("disk", direct=True),
    "pinned": StoreOptions("disk", cache_bytes=2**20, hot=[*range(10, 40), 5, 10]),
    "recent": StoreOptions("disk", cache_bytes=2**16, direct=True, first_touch=True),
}


@pytest.fixture(scope="module", params=[34, 1024])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random rows of 680 bytes, or of five pages: with and without whole pages."""
    folder = tmp_path_factory.mktemp("tol")
    return random_table(folder, VOCABULARY, LAYERS, request.param, cuts=(100, 101, 433))


def opened(folder: Path, options: StoreOptions) -> RowStore:
    return open_store(folder, read_index(folder), options, torch.device("cpu"))


SCHEMES = {
    "bfloat16": Scheme(dtype="bfloat16"),
    "int8": Scheme(dtype="int8", group_size=8, symmetric=False),
    "int4": Scheme(dtype="int4", group_size=16),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_decoded_whole_and_equal_many(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.model_validate(
        {"kind": "memory", "vocab_size": 60, "hidden_size": 40, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "intermediate_size": 8, "max_position_embeddings": 8}
    )
    folder = write_random_table(tmp_path / "tol", config, SCHEMES[name])
    source, reader = TolSource.open_folder(folder, config), TableReader.open_folder(folder)
    ids = torch.tensor([[3, 59, 3], [0, 7, 59]])
    x0 = torch.zeros(2, 3, 40, dtype=dtype)
    whole = source.open(ids, x0)
    monkeypatch.setattr(layers, "TOGETHER", 0)
    parts = source.open(ids, x0)
    for layer in (2, 0, 1):
        expected = reader.values(reader.range(0, 60), layer)[ids].to(dtype)
        assert torch.equal(whole(layer), expected) and torch.equal(parts(layer), expected)


def drawn(count: int, seed: int) -> Tensor:
    return torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.mark.parametrize("name", OPTIONS)
def test_every_tier_gives_the_rows(name: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, many, all, none of a partition; read whole, or in parts; again, from the cache."""
    monkeypatch.setattr(parts, "PART_BYTES", 4096)
    expected, store = TableReader.open_folder(table).range(0, VOCABULARY), opened(table, OPTIONS[name])
    counts = (1, 7, parts.MANY_ROWS, 300, 20, 20, VOCABULARY)
    try:
        for seed, count in enumerate(counts):
            ids = drawn(count, min(seed, 4))
            rows = store.fetch(ids)
            size = expected.shape[1]
            for first, last in ((0, 4), (size // LAYERS, 2 * size // LAYERS), (size - 1, size), (0, size)):
                assert torch.equal(rows.columns(first, last), expected[ids, first:last])
        counters = store.counters
        assert counters.distinct == counters.hits + counters.misses == sum(counts)
        assert counters.bytes == counters.misses * size
        assert (counters.hits > 0) == (name in ("pinned", "recent"))
    finally:
        store.close()


def test_direct_reads_of_rows_that_are_no_whole_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 64 of 8,256 bytes begins at a page in the file, but would not in rows one after the other."""
    monkeypatch.setattr(parts, "PART_BYTES", 4096)
    store = opened(random_table(tmp_path, 130, 2, 1032), OPTIONS["direct"])
    rows = store.fetch(torch.arange(1, 130)).columns(0, 8256)
    assert torch.equal(rows, TableReader.open_folder(tmp_path).range(1, 130))
    store.close()


def test_fixed_rows_are_always_hits_and_recent_ones_after_the_first_time(table: Path) -> None:
    size = read_index(table).row_bytes
    pinned = opened(table, StoreOptions("disk", cache_bytes=4 * size, hot=[7, 300, 7, 650, 2, 9]))
    recent = opened(table, StoreOptions("disk", cache_bytes=4 * size))
    for store in (pinned, recent):
        for ids in ([2, 7, 300], [7, 300, 650], [2, 9, 400, 401], [7, 9, 401]):
            store.fetch(torch.tensor(ids)).columns(0, size)
    # Four rows fit: 7, 300, 650 (7 is named twice). Recent: 2 and 7 leave for 9, 400 and 401.
    assert (pinned.counters.hits, recent.counters.hits) == (2 + 3 + 0 + 1, 0 + 2 + 1 + 2)
    pinned.close()
    recent.close()


def test_what_cannot_be_read_is_one_error_and_the_store_goes_on(table: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table, tmp_path / "tol")
    index, size = read_index(folder), read_index(folder).row_bytes
    touched = opened(folder, StoreOptions("disk", first_touch=True, direct=True))
    file = folder / index.partitions[2].file
    with file.open("r+b") as data:
        data.seek(-10, os.SEEK_END)
        data.write(b"0123456789")
    with pytest.raises(UserError, match=f"{file.name} .*is damaged"):
        touched.fetch(torch.tensor([432]))
    assert touched.fetch(torch.tensor([100])).columns(0, size).shape == (1, size)
    os.truncate(file, index.partitions[2].bytes - 5 * size)
    store = opened(table, OPTIONS["direct"])
    short = disk.DiskStore(folder, index, OPTIONS["direct"], (0, size))
    for _ in range(2):
        with pytest.raises(UserError, match=r"could not be read: .* ends before byte"):
            short.fetch(torch.tensor([3, 110, 432])).columns(0, size)
        file.unlink(missing_ok=True)  # an open file stays
        ids = torch.tensor([3, 110, 600])
        assert torch.equal(short.fetch(ids).columns(0, size), store.fetch(ids).columns(0, size))
    before = threading.active_count()
    store.close()
    short.close()
    del touched  # the end of its life does the same
    assert threading.active_count() == before - 3 * OPTIONS["direct"].depth


def test_rows_of_two_requests_are_both_kept(table: Path) -> None:
    """A prompt's second part is asked for while the first is read: both are hits the next time."""
    index = read_index(table)
    store = opened(table, StoreOptions("disk", cache_bytes=300 * index.row_bytes))
    first, second = drawn(200, 1)[:100], drawn(200, 1)[100:]
    pending = [store.fetch(first), store.fetch(second)]
    for rows in pending:
        rows.columns(0, index.row_bytes)
    for ids in (first, second):
        store.fetch(ids).columns(0, index.row_bytes)
    assert (store.counters.hits, store.counters.misses) == (200, 200)
    store.close()


def test_options_that_do_not_go_together(table: Path) -> None:
    for options, message in (
        (StoreOptions("shared", cache_bytes=1), "are for tier disk"),
        (StoreOptions("resident", direct=True), "are for tier disk"),
        (StoreOptions("disk", lock=True), "use tier shared"),
        (StoreOptions("disk", cache_bytes=2**20, hot=[3, VOCABULARY]), "give data of its tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            opened(table, options)
    with pytest.raises(UserError, match=r"a cache of 1099.51 TB does not fit"):
        disk._Cache.of(StoreOptions("disk", cache_bytes=1000 * 2**40), 2**40, 5000)


def config_of(index: TolIndex) -> ModelConfig:
    """A model of the table's shape."""
    return ModelConfig(
        kind="memory", vocab_size=VOCABULARY, hidden_size=index.hidden_size, num_hidden_layers=LAYERS,
        num_attention_heads=1, intermediate_size=8,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_of_some_layers_only_their_bytes_are_read(name: str, table: Path) -> None:
    """As a pipeline's stage does; of no layer nothing is read."""
    index = read_index(table)
    ids, x0 = torch.tensor([3, 650, 5, 20, 3]), torch.zeros(5, index.hidden_size)
    whole = TolSource.open_folder(table, config_of(index)).open(ids, x0)
    for asked, width in (([0, 1], 2), ([4, 2], 3), ([3], 1), ([], 0)):
        source = TolSource.open_folder(table, config_of(index), OPTIONS[name], layers=asked)
        for _ in range(2):
            read = source.open(ids, x0)
            assert all(torch.equal(read(layer), whole(layer)) for layer in asked)
        counters = source.store.counters
        assert counters.bytes == counters.misses * width * index.row_bytes // LAYERS
        assert (counters.hits > 0) == (name in ("pinned", "recent") and width > 0)
        source.store.close()


def test_requested_rows_are_not_read_again(table: Path) -> None:
    index = read_index(table)
    source = TolSource.open_folder(table, config_of(index), OPTIONS["disk"])
    ids, x0 = torch.tensor([[3, 5, 3], [650, 5, 5]]), torch.zeros(2, 3, index.hidden_size)
    for _ in range(2):  # the batch before, and the batch itself
        source.request(ids)
    read = source.open(ids, x0)
    expected = TolSource.open_folder(table, config_of(index)).open(ids, x0)
    assert all(torch.equal(read(layer), expected(layer)) for layer in range(LAYERS))
    counters = source.store.counters
    assert (counters.rows, counters.distinct, counters.bytes) == (6, 3, 3 * index.row_bytes)
    assert f"mlm_tol_bytes_total {3 * index.row_bytes}\n" in counters.prometheus()
    source.request(ids)
    source.open(ids[:1], x0[:1])  # others come first, as the chunk before the next one does
    source.open(ids, x0)
    assert counters.distinct == 3 + 3 + 2
    source.store.close()
