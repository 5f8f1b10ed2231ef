"""Each rank writes, reads and hashes its own share of a checkpoint, once, in any layout."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlm_train.checkpoint.digests import ShardRecord, Unit, units
from mlm_train.checkpoint.manifest import MANIFEST, write_manifest
from mlm_train.checkpoint.together import dealt
from mlm_train.utils.records import SEAL, FileRecord
from tests.ranks import run_on_ranks

EVEN = {"kind": "memory", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
ODD = {"kind": "memory", "vocab_size": 97, "intermediate_size": 45, "hidden_size": 40}  # 97 is a prime
TIED = ODD | {"tie_word_embeddings": True}
FSDP: dict = {"mode": "unique", "parallel": {"engine": "fsdp"}}


def zero(stage: int, **parallel: int) -> dict:
    """A layout under DeepSpeed."""
    return {"mode": "unique", "parallel": {"zero_stage": stage, **parallel}}


def fsdp(mode: str = "unique", **parallel: object) -> dict:
    """A layout under FSDP."""
    return {"mode": mode, "parallel": {"engine": "fsdp", **parallel}}


# Rows that data parallelism does not divide; flat partitions that begin and end within rows and parameters.
WORLDS = {
    1: {"one process": fsdp(), "ZeRO-0 alone": zero(0)},
    2: {"TP2": fsdp(tensor=2), "PP2": fsdp(pipeline=2), "ZeRO-0": zero(0), "TP2 ZeRO-1": zero(1, tensor=2)},
    3: {
        "DP3": fsdp(),
        "DP3 table": fsdp("table"),
        "DP3 owned": fsdp("table owned"),
        "ZeRO-0": zero(0),
        "ZeRO-1": zero(1),
        "ZeRO-2": zero(2),
        "ZeRO-3": zero(3),
    },
    4: {
        "HSDP": fsdp(replicate=2),
        "replicated": fsdp(replicate=4),
        "TP2 DP2": fsdp(tensor=2),
        "PP2 DP2": fsdp(pipeline=2),
        "PP2 DP2 ZeRO-1": zero(1, pipeline=2),
        "TP2 DP2 ZeRO-3": zero(3, tensor=2),
        "TP2 DP2 owned": fsdp("table owned", tensor=2),
        "ZeRO-0": zero(0),
    },
}


WRITERS = {
    "ZeRO-1 on 3": (3, zero(1), ODD),
    "FSDP on 4, tied": (4, fsdp(), TIED),
    "TP2 ZeRO-1 on 4, tied": (4, zero(1, tensor=2), TIED),
}


@pytest.mark.parametrize(
    "written",
    [pytest.param(name, marks=pytest.mark.long) if name.startswith("FSDP") else name for name in WRITERS],
)
def test_a_checkpoint_of_any_layout_loads_in_any_other(tmp_path: Path, written: str) -> None:
    """Weights and moments, bit by bit, after each move."""
    world, layout, model = WRITERS[written]
    run_on_ranks("tests.checkpoint.share_cases:save", world, folder=str(tmp_path), model=model, layout=layout)
    for ranks, layouts in WORLDS.items():
        moved = run_on_ranks(
            "tests.checkpoint.share_cases:move", ranks, folder=str(tmp_path), model=model, layouts=layouts
        )
        for name, found in moved.items():
            assert found["differ"] == found["weights"] == [], (name, found)


def test_a_rank_writes_its_share(tmp_path: Path) -> None:
    sizes = {}
    for ranks, name, layout in (
        (1, "alone", fsdp()),
        (4, "FSDP", fsdp()),
        (4, "HSDP", fsdp(replicate=2)),
        (4, "table", fsdp("table")),
        (4, "owned", fsdp("table owned")),
        (4, "ZeRO-0", zero(0)),
        (4, "ZeRO-1", zero(1)),
        (4, "ZeRO-3", zero(3)),
    ):
        sizes[name] = run_on_ranks(
            "tests.checkpoint.share_cases:save", ranks, folder=str(tmp_path / name), model=EVEN, layout=layout
        )
    print(sizes)
    (alone,) = sizes.pop("alone")
    for name, files in sizes.items():
        assert len(files) == 4 and max(files) <= 0.27 * alone, (name, files)


def test_all_ranks_together_read_a_checkpoint_once(tmp_path: Path) -> None:
    """Each opens the files that hold something of its share: one, where the layout is the writer's."""
    run_on_ranks("tests.checkpoint.share_cases:save", 4, folder=str(tmp_path), model=EVEN, layout=fsdp())
    layouts = {
        "FSDP": fsdp(),
        "HSDP": fsdp(replicate=2),
        "table": fsdp("table"),
        "owned": fsdp("table owned"),
        "PP2": fsdp(pipeline=2),
        **{f"ZeRO-{stage}": zero(stage) for stage in range(4)},
    }
    found = run_on_ranks(
        "tests.checkpoint.share_cases:move", 4, folder=str(tmp_path), model=EVEN, layouts=layouts
    )
    for name, counts in found.items():
        print(name, counts["read"], counts["opens"])
        assert counts["differ"] == [] and counts["read"] <= 1.05, (name, counts)
    assert found["FSDP"]["opens"] == [1 + 1, 1, 1, 1]  # rank 0 reads the index as well
    some = {name: layouts[name] for name in ("FSDP", "HSDP", "owned", "ZeRO-1")}
    started = run_on_ranks(
        "tests.checkpoint.share_cases:warm", 4, folder=str(tmp_path), model=EVEN, layouts=some
    )
    for name, counts in started.items():
        print(name, counts)
        assert counts["differ"] == [] and counts["read"] <= 1.1, (name, counts)


def test_bytes_are_dealt_evenly_and_in_order() -> None:
    """A huge file too: in blocks. Those of old checkpoints are hashed whole."""
    sizes = [500, 100, 1, 0, 60, 300, 10]
    old = [FileRecord(file=str(size), bytes=size, sha256="") for size in sizes]
    new = [ShardRecord(**entry.model_dump(), block=20) for entry in old]
    for entries, largest in ((old, 500), (new, 20)):
        for ranks in (1, 2, 3, 8):
            shares = dealt(units(entries), ranks)
            assert [unit for share in shares for unit in share] == units(entries)
            assert all(sum(unit.size for unit in share) <= sum(sizes) / ranks + largest for share in shares)
    assert [unit.size for unit in units(new[:1])] == [20] * 25
    assert units(new[2:4]) == [Unit(0, 0, 1), Unit(1, 0, 0)]


def middle_flipped(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def joined_by_another(file: Path) -> None:
    file.with_name("shard-7.safetensors").write_bytes(b"x")


def of_another_step(file: Path) -> None:
    """The same name, size and tensors, other values."""
    other = file.parents[1] / "step-00000002" / file.name
    assert other.stat().st_size == file.stat().st_size
    file.write_bytes(other.read_bytes())


def of_another_rank(file: Path) -> None:
    """Each header fits its file; without a look at the manifest, elements are there twice or never."""
    file.write_bytes(file.with_name("shard-00002.safetensors").read_bytes())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of four ranks, of different steps."""
    root = tmp_path_factory.mktemp("written")
    for step in (1, 2):
        run_on_ranks(
            "tests.checkpoint.share_cases:save", 4, folder=str(root), model=ODD, layout=FSDP, step=step
        )
    return root


EVERY_CHECK = ["full", "sizes", "none"]
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "flipped": (middle_flipped, ["full"], "is damaged: its checksum differs"),
    "short": (cut_short, EVERY_CHECK, "bytes instead of"),
    "missing": (Path.unlink, EVERY_CHECK, "is missing"),
    "foreign": (joined_by_another, ["full", "sizes"], "is not in"),
    "of another step": (of_another_step, ["full"], "is damaged: its checksum differs"),
    "of another rank": (of_another_rank, ["full", "none"], "bytes instead of|is incomplete"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_rank_names_the_damaged_file(tmp_path: Path, written: Path, kind: str) -> None:
    root = shutil.copytree(written, tmp_path / "checkpoints")
    damage, checks, said = DAMAGE[kind]
    victim = max((root / "step-00000001").glob("*.safetensors"))
    assert victim.name == "shard-00003.safetensors"
    damage(victim)
    shutil.rmtree(root / "step-00000002")
    arguments = {"folder": str(tmp_path), "model": ODD, "layout": FSDP}
    for line in run_on_ranks("tests.checkpoint.share_cases:refuse", 3, checks=checks, **arguments):
        assert line is not None and re.search(said, line) and "\n" not in line, line
        assert ("shard-7" if kind == "foreign" else victim.name) in line or "is incomplete" in line
        assert str(root / "step-00000001") in line


def as_version_3(folder: Path) -> None:
    """Without an index, and with checksums of whole files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / manifest.pop("index")["file"]).unlink()
    del manifest[SEAL]
    for entry in manifest["files"]:
        del entry["block"]
        entry["sha256"] = hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()
    write_manifest(folder, manifest | {"version": 3})


def test_ranks_fall_back_together(tmp_path: Path) -> None:
    """Past two damaged ones, one by its size, one by its content, to one of version 3."""
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        run_on_ranks(
            "tests.checkpoint.share_cases:save", 2, folder=str(root), model=ODD, layout=FSDP, step=step
        )
    as_version_3(root / "step-00000001")
    middle_flipped(root / "step-00000002" / "shard-00001.safetensors")
    (root / "step-00000003" / "shard-00000.safetensors").write_bytes(b"")
    name, *faults = run_on_ranks(
        "tests.checkpoint.share_cases:fall_back", 2, folder=str(tmp_path), model=ODD, layout=FSDP
    )
    assert name == "step-00000001"
    assert "bytes instead of" in faults[0] and "checksum differs" in faults[1]


def test_a_slow_disk_is_no_hang(tmp_path: Path) -> None:
    """One rank writes, and hashes, for longer than the watchdog and a collective allow; the other waits."""
    limit = 5.0
    took = run_on_ranks(
        "tests.checkpoint.share_cases:slow_disk", 2, folder=str(tmp_path), model=ODD, limit=limit
    )
    assert min(took.values()) > 1.5 * limit, took
