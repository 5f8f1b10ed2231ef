"""Rectangles of logical tensors: written, found and read bit for bit, gaps and damage included."""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from mlm_train.checkpoint import shards
from mlm_train.checkpoint.digests import ShardRecord, first_fault, hashed, units
from mlm_train.checkpoint.index import CheckpointIndex, read_index
from mlm_train.checkpoint.index_file import merged, write_index
from mlm_train.checkpoint.reading import slices as reading
from mlm_train.checkpoint.reading.slices import read_slices, read_tensor
from mlm_train.checkpoint.shards import OFFSETS, write_shard
from mlm_train.errors import UserError
from mlm_train.model.logical import LogicalSlice
from mlm_train.parallel.engine.flat import Run, cut_anywhere, cut_evenly, rectangles
from mlm_train.utils.direct import PAGE
from mlm_train.utils.files import finished
from mlm_train.utils.records import FileRecord

SHAPES: list[tuple[int, ...]] = [(7,), (1, 5), (5, 1), (4, 3), (2, 3, 4), (3, 1, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rectangles_are_the_elements_of_a_range_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        found = list(rectangles(shape, start, stop))
        assert torch.cat([numbers[rectangle].flatten() for rectangle in found]).tolist() == list(
            range(start, stop)
        )
        assert len(found) <= 2 * len(shape) - 1


def test_runs_cover_a_parameter_once_whatever_divides_it() -> None:
    for numel, size, at in itertools.product((1, 7, 12), (1, 5, 12, 40), (0, 3, 9)):
        for cut in (cut_anywhere, cut_evenly):
            runs: list[Run] = [cut(at, numel, size, rank) for rank in range(60)]
            held = [element for run in runs for element in range(run.start, run.start + run.length)]
            assert held == list(range(numel)), (numel, size, at)


def parts_of(name: str, whole: Tensor, chance: random.Random) -> list[LogicalSlice]:
    """A tensor cut at random: flat ranges as rectangles, or a grid."""
    boxes: list[tuple[slice, ...]] = []
    if chance.random() < 0.5:
        cuts = sorted({0, whole.numel(), *(chance.randrange(whole.numel() + 1) for _ in range(3))})
        for start, stop in itertools.pairwise(cuts):
            boxes += rectangles(whole.shape, start, stop)
    else:
        axes = []
        for size in whole.shape:
            cuts = sorted({0, size, chance.randrange(size + 1)})
            axes.append([slice(a, b) for a, b in itertools.pairwise(cuts)])
        boxes = list(itertools.product(*axes))
    return [LogicalSlice(name, whole.shape, tuple(s.start for s in box), whole[box]) for box in boxes]


def written(folder: Path, files: Sequence[Sequence[LogicalSlice]]) -> list[ShardRecord]:
    """Files of these parts; their manifest entries."""
    return [
        finished(write_shard(folder / f"shard-{number:05d}.safetensors", parts)).entry
        for number, parts in enumerate(files)
        if parts
    ]


@pytest.mark.parametrize("page", [1, 64, 4096])
def test_any_rectangle_is_read_from_any_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """Row by row or with the gaps between, in one block or many, into views of any stride."""
    monkeypatch.setattr(reading, "PAGE", page)
    monkeypatch.setattr(reading, "BLOCK", 48)
    chance = random.Random(5)
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = {f"weight/{i}": torch.rand(chance.choice(SHAPES)) for i in range(4)}
        files: list[list[LogicalSlice]] = [[], [], []]
        for name, tensor in tensors.items():
            for part in parts_of(name, tensor, chance):
                chance.choice(files).append(part)
        entries = written(folder, files)
        index = read_index(folder, entries)
        wanted, expected = [], []
        for name, tensor in tensors.items():
            assert torch.equal(read_tensor(index, name), tensor)
            box = [sorted(chance.sample(range(size + 1), 2)) for size in tensor.shape]
            spans = tuple(slice(a, b) for a, b in box)
            sizes = [b - a for a, b in box]
            there = torch.full([2 * size for size in sizes], math.nan)[
                tuple(slice(0, None, 2) for _ in sizes)
            ]
            wanted.append(LogicalSlice(name, tensor.shape, tuple(a for a, _ in box), there))
            expected.append(tensor[spans])
        for _ in read_slices(index, wanted):
            pass
        assert all(torch.equal(part.tensor, tensor) for part, tensor in zip(wanted, expected, strict=True))


def two_halves(folder: Path) -> tuple[Tensor, list[ShardRecord]]:
    """A tensor of 6 x 4, three rows in each of two files."""
    whole = torch.rand(6, 4)
    files = [[LogicalSlice("weight/a", whole.shape, (row, 0), whole[row : row + 3])] for row in (0, 3)]
    return whole, written(folder, files)


def line_of(work: Callable[[], object]) -> str:
    """The line of the UserError that `work` raises."""
    with pytest.raises(UserError) as refusal:
        work()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_gap_is_found_where_other_parts_are_there_twice(tmp_path: Path) -> None:
    """Counting elements alone would not do."""
    whole, entries = two_halves(tmp_path)
    files = [[LogicalSlice("weight/a", whole.shape, (row, 0), whole[row : row + 2]) for row in (0, 1, 4)]]
    (tmp_path / "gap").mkdir()
    index = read_index(tmp_path / "gap", written(tmp_path / "gap", files))
    assert "weight/a is incomplete" in line_of(lambda: index.check_whole("weight/a"))
    assert "weight/a is incomplete" in line_of(lambda: read_tensor(index, "weight/a"))
    assert torch.equal(read_tensor(index, "weight/a", 4), whole[4:])  # what is there once can be read
    assert "weight/a is incomplete" in line_of(
        lambda: read_tensor(read_index(tmp_path, entries[:1]), "weight/a")
    )
    assert "weight/b is missing" in line_of(lambda: read_tensor(index, "weight/b"))
    other = LogicalSlice("weight/a", torch.Size([5, 4]), (0, 0), torch.empty(5, 4))
    assert "has shape [6, 4], not [5, 4]" in line_of(lambda: list(read_slices(index, [other])))


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    _, entries = two_halves(tmp_path)
    path = tmp_path / entries[1].file
    index, contents = read_index(tmp_path, entries), path.read_bytes()
    damages: dict[str, tuple[bytes, str]] = {
        "short": (contents[:-4], f"{len(contents) - 4} bytes instead of {len(contents)}"),
        "long": (contents + b"1234", f"{len(contents) + 4} bytes instead of {len(contents)}"),
        "no header": (contents[:20], "its header is longer than the file"),
        "empty": (b"", "its header is longer than the file"),
        "no JSON": (contents[:8] + b"?" + contents[9:], "is not JSON"),
        "other size": (
            contents.replace(b'"shape": [3, 4]', b'"shape": [3, 3]'),
            "another size than its shape",
        ),
        "other place": (contents.replace(b"[3, 0]", b"[4, 0]"), "do not fit together"),
    }
    for kind, (changed, said) in damages.items():
        path.write_bytes(changed)
        line = line_of(lambda: read_index(tmp_path, entries))
        assert said in line and (kind == "other place" or path.name in line), line
    path.write_bytes(contents[:-4])  # cut since the index was read
    line = line_of(lambda: read_tensor(index, "weight/a"))
    assert f"{path} is damaged: it ends at byte {len(contents) - 4}" in line
    path.unlink()
    assert f"{path} is missing" in line_of(lambda: read_index(tmp_path, entries))
    outside = entries[1].model_copy(update={"file": "../secret"})
    assert "not a file of that folder" in line_of(lambda: read_index(tmp_path, [outside]))


def test_the_index_says_what_the_headers_say(tmp_path: Path) -> None:
    """And a load then opens no file for its header; damage of the index is one line."""
    chance = random.Random(3)
    tensors = {f"weight/{i}": torch.rand(chance.choice(SHAPES)) for i in range(6)}
    files = [parts_of(name, tensor, chance) for name, tensor in tensors.items()]
    written_files = [
        finished(write_shard(tmp_path / f"shard-{number:05d}.safetensors", parts))
        for number, parts in enumerate(files)
    ]
    entries = [one.entry for one in written_files]
    names = [entry.file for entry in entries]
    record = write_index(tmp_path, names, merged([one.places for one in written_files]))
    headers, index = read_index(tmp_path, entries), read_index(tmp_path, entries, record)
    assert headers.tensors.keys() == index.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        one, other = headers.tensors[name], index.tensors[name]
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        for field in ("start", "stop", "file", "begin"):
            assert np.array_equal(getattr(one, field), getattr(other, field)), (name, field)
        assert torch.equal(read_tensor(index, name), tensor)
    for others in (entries[1:], entries[::-1]):
        line = line_of(lambda others=others: read_index(tmp_path, others, record))
        assert f"{tmp_path / record.file} lists other files than the manifest" in line
    path = tmp_path / record.file
    contents = path.read_bytes()
    damages: dict[str, tuple[bytes, str]] = {
        "another": (contents[:-1] + b"?", "its checksum differs"),
        "short": (contents[:-8], "is damaged (at weight/"),
        "long": (contents + bytes(8), "is damaged (at its end)"),
        "empty": (b"", "is not JSON"),
        "no file": (contents.replace(b'"rectangles": ', b'"rectangles":9'), "is damaged (at weight/"),
        "far": (contents[:-8] + (2**40).to_bytes(8, "little"), "is damaged (at weight/"),
        "negative": (contents[:-8] + b"\xff" * 8, "is damaged (at weight/"),
    }
    for kind, (changed, said) in damages.items():
        path.write_bytes(changed)
        digest = record.sha256 if kind == "another" else hashlib.sha256(changed).hexdigest()
        line = line_of(lambda digest=digest: read_index(tmp_path, entries, named(record.file, digest)))
        assert said in line and path.name in line, (kind, line)
    path.unlink()
    assert f"{path} is missing" in line_of(lambda: read_index(tmp_path, entries, record))
    assert "not a file of that folder" in line_of(
        lambda: read_index(tmp_path, entries, named("../index", record.sha256))
    )


def named(file: str, sha256: str) -> FileRecord:
    """An entry of a manifest."""
    return FileRecord(file=file, bytes=0, sha256=sha256)


def test_a_file_of_many_blocks_is_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks' borders cut. Infinity and NaN are found; numbers whose sum overflows are fine."""
    monkeypatch.setattr(shards, "BLOCK", PAGE)
    monkeypatch.setattr(shards, "PIECE", 1000)
    whole = torch.full((61, 43), 3e38)
    parts = [LogicalSlice("weight/a", whole.shape, (0, 0), whole[:30])]
    parts += [LogicalSlice("weight/a", whole.shape, (30, 0), whole[30:])]
    path = tmp_path / "shard-00000.safetensors"
    entry = finished(write_shard(path, parts)).entry
    assert entry.bytes == path.stat().st_size > 2 * PAGE and entry.block == PAGE
    assert torch.equal(read_tensor(read_index(tmp_path, [entry]), "weight/a"), whole)
    blocks = [path.read_bytes()[begin : begin + PAGE] for begin in range(0, entry.bytes, PAGE)]
    together = hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks))
    assert entry.sha256 == together.hexdigest()
    assert first_fault(tmp_path, [entry], finished(hashed(tmp_path, [entry], units([entry])))) is None
    for place in (0, 1234, whole.numel() - 1):
        broken = whole.clone()
        broken.view(-1)[place] = (math.nan, math.inf, -math.inf)[place % 3]
        with pytest.raises(shards.NonFinite, match="weight/b"):
            finished(write_shard(path, [LogicalSlice("weight/b", whole.shape, (0, 0), broken)]))


def test_version_2_and_torch_agree_on_the_files(tmp_path: Path) -> None:
    """Version 2 has offsets alone. torch's own reader reads what has one part of a tensor in a file."""
    whole = torch.rand(6, 4)
    for row in (0, 3):
        places = {"weight/a": {"saved_offsets": [row, 0]}}
        save_file(
            {"weight/a": whole[row : row + 3].clone()},
            tmp_path / f"shard-{row}.safetensors",
            metadata={OFFSETS: json.dumps(places)},
        )
    files = [FileRecord(file=f"shard-{row}.safetensors", bytes=0, sha256="") for row in (0, 3)]
    assert torch.equal(read_tensor(read_index(tmp_path, files), "weight/a"), whole)
    (tmp_path / "new").mkdir()
    whole, entries = two_halves(tmp_path / "new")
    found = {"weight/a": torch.full((6, 4), math.nan)}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path / "new")), no_dist=True)
    assert torch.equal(found["weight/a"], whole)
    assert load_file(tmp_path / "new" / entries[0].file).keys() == {"weight/a"}


def test_only_what_is_needed_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, entries = two_halves(tmp_path)
    index: CheckpointIndex = read_index(tmp_path, entries)
    opened: list[str] = []
    honest = reading.open_regular
    monkeypatch.setattr(reading, "open_regular", lambda path: opened.append(path.name) or honest(path))
    assert torch.equal(read_tensor(index, "weight/a", 3, 5), whole[3:5])
    assert opened == [entries[1].file]
