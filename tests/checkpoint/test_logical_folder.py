"""A model is read the same from an export and from a checkpoint of any layout; anything else is rejected."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlm_train.checkpoint.folders import newest
from mlm_train.checkpoint.hf.config import config_json
from mlm_train.checkpoint.load import config_of, open_checkpoint
from mlm_train.checkpoint.reading.joined import open_joined
from mlm_train.checkpoint.reading.logical_folder import OpenedModel, open_model, read_model_config
from mlm_train.errors import UserError
from mlm_train.parallel import runtime
from tests.checkpoint.test_half_copied import HALVES
from tests.commands import TINY, mlm_train
from tests.ranks import run_on_ranks

ODD = ("model.vocab_size=515", "model.intermediate_size=45")  # neither 2 nor 4 divides them
TIED = "model.tie_word_embeddings=true"
FLEX = ("model.kind=flex", "model.flex_beta=2")
TP2_PP2 = ("parallel.tensor=2", "parallel.pipeline=2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "TP2 PP2": (4, TP2_PP2),
    "TP2 PP2, tied": (4, (*TP2_PP2, TIED)),
    "TP2 DP2, ZeRO-2, flex": (4, ("parallel.tensor=2", "parallel.zero_stage=2", *FLEX)),
    "DP2, ZeRO-3, tied": (2, ("parallel.zero_stage=3", TIED)),
}


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A run in this process must not disturb the next."""
    yield
    runtime.stop()


def words(data: Path, run: Path, *more: str) -> list[str]:
    paths = (f"data.path={data}", f"train.output={run}", "train.steps=2", "checkpoint.interval=1")
    return ["configs/micro.yaml", *TINY, *ODD, *paths, "memory.mode=unique", *more]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on one process, with two checkpoints."""
    run = tmp_path_factory.mktemp("logical") / "run"
    mlm_train("pretrain", *words(data, run))
    runtime.stop()
    return run


def same(opened: OpenedModel, export: Path) -> None:
    """Every tensor, and random slices of its rows, are bitwise equal to the export's."""
    expected, chance = load_file(export / "model.safetensors"), random.Random(7)
    assert opened.tensors.names() == sorted(expected)
    for name, tensor in expected.items():
        assert opened.shape(name) == tensor.shape and opened.dtype(name) == "F32"
        assert torch.equal(opened.tensor(name), tensor), name
        for _ in range(8):
            start, stop = sorted(chance.choices(range(len(tensor) + 1), k=2))
            assert torch.equal(opened.rows(name, start, stop), tensor[start:stop]), (name, start, stop)


def parts_of(checkpoint: Path) -> Counter[str]:
    """Name of a weight -> files that hold a part of it."""
    files = [load_file(file) for file in checkpoint.glob("*.safetensors")]
    return Counter(name for file in files for name in file if name.startswith("weight/"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_reads_as_its_export(data: Path, tmp_path: Path, layout: str) -> None:
    world, more = LAYOUTS[layout]
    run, export = tmp_path / "run", tmp_path / "export"
    run_on_ranks("tests.checkpoint.logical_cases:pretrain", world, words=words(data, run, *more))
    mlm_train("export", run, "--output", export)
    checkpoint = run / "checkpoints" / "step-00000002"
    if "TP2" in layout:  # the point of this test: tensors split by rows and by columns
        assert set(parts_of(checkpoint).values()) == {1, 2}
    for path in (run, run / "checkpoints", checkpoint):
        with open_model(path, needs_ffn_m=True) as opened:
            assert opened.path == checkpoint and read_model_config(path) == opened.config
            same(opened, export)
    with open_model(export) as exported, open_model(checkpoint, verify=False) as again:
        same(exported, export)
        assert config_json(exported.config) == config_json(again.config)
        assert exported.config.tie_word_embeddings == (TIED in more)


def test_a_fingerprint_names_weights_and_not_files(trained: Path, data: Path, tmp_path: Path) -> None:
    """Equal for a copy and for another layout's files of the same weights, but not for another step."""
    still = ("optimizer.lr=1e-30", "schedule.min_lr=0", "schedule.warmup_steps=0", "train.steps=1")
    found = []
    for name, (world, layout) in (("one", (1, ())), ("four", LAYOUTS["TP2 PP2"])):
        run_words = words(data, tmp_path / name, *still, *layout)
        run_on_ranks("tests.checkpoint.logical_cases:pretrain", world, words=run_words)
        found.append(open_model(tmp_path / name).fingerprint)
    assert found[0] == found[1]
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert open_model(copy).fingerprint == open_model(trained).fingerprint
    first = open_model(trained / "checkpoints" / "step-00000001").fingerprint
    assert len({first, open_model(trained).fingerprint, *found}) == 3


def line_of(path: Path, **options: bool) -> str:
    """The line with which a folder is rejected."""
    with pytest.raises(UserError) as refusal:
        open_model(path, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("half", HALVES)
def test_half_of_a_checkpoint_is_refused(trained: Path, tmp_path: Path, half: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "copy"))
    damage, said = HALVES[half]
    folder = newest(run / "checkpoints")
    assert folder is not None
    damage(folder)
    for path in (run, folder):
        line = line_of(path)
        assert said in line and folder.name in line and "delete" in line


def flip(path: Path, place: int) -> None:
    contents = bytearray(path.read_bytes())
    contents[place] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize("place", [9, 40, -1])
def test_a_changed_bit_is_refused_wherever_it_is(trained: Path, tmp_path: Path, place: int) -> None:
    """Also in the header, which is not read before the checksum was compared."""
    run = Path(shutil.copytree(trained, tmp_path / "copy"))
    file = next((run / "checkpoints" / "step-00000002").glob("*.safetensors"))
    flip(file, place)
    assert f"{file} is damaged: its checksum differs" in line_of(run)


def test_a_tensor_without_all_its_parts_is_refused(data: Path, tmp_path: Path) -> None:
    """As with a manifest that lists too few files."""
    run = tmp_path / "run"
    run_on_ranks("tests.checkpoint.logical_cases:pretrain", 4, words=words(data, run, *TP2_PP2))
    folder = run / "checkpoints" / "step-00000002"
    manifest = open_checkpoint(folder)
    for left_out in range(len(manifest.files)):
        files = [entry for number, entry in enumerate(manifest.files) if number != left_out]
        for index, said in ((manifest.index, "lists other files"), (None, r"incomplete|missing|shape")):
            fewer = manifest.model_copy(update={"files": files, "index": index})
            with pytest.raises(UserError, match=said):
                open_joined(folder, fewer).check(config_of(manifest).model)


def test_a_base_model_is_refused_where_ffn_m_is_needed(data: Path, tmp_path: Path) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    base = [word for word in words(data, run, "model.kind=base") if not word.startswith("memory.")]
    mlm_train("pretrain", *base)
    mlm_train("export", run, "--output", export)
    for path in (run, export):
        assert "is a base model and has no FFN-M" in line_of(path, needs_ffn_m=True)
        with open_model(path) as opened:
            same(opened, export)


NO_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: folder.rmdir(), "is not a folder"),
    "a file": (lambda folder: (folder.rmdir(), folder.write_text("text")), "is not a folder"),
    "an empty folder": (lambda folder: None, "holds no model"),
    "other files": (lambda folder: (folder / "notes.txt").write_text("text"), "holds no model"),
    "a config alone": (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    "weights alone": (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "config.json"),
    "a run that saved nothing": (lambda folder: (folder / "checkpoints").mkdir(), "holds no model"),
}


@pytest.mark.parametrize("kind", NO_MODELS)
def test_no_model_is_one_line(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make, said = NO_MODELS[kind]
    make(folder)
    line = line_of(folder)
    assert said in line and str(folder) in line and (";" in line)
