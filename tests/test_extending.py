"""A user's part of each kind (tests/extensions.py) in real use, and errors for unknown names."""

import csv
import os
import re
from pathlib import Path

import pytest

from mlm_train.config import choices
from mlm_train.memory import MODES
from mlm_train.monitor.writers import WRITERS
from mlm_train.parallel.engine import ENGINES
from mlm_train.parallel.pipeline.x0 import TRANSPORTS
from mlm_train.tol.format.index import INDEX
from tests import extensions
from tests.commands import ROOT, TINY, finished, mlm_train, refused, same_losses, scalars
from tests.tol.conftest import export, random_model


def pretrain(data: Path, run: Path, *more: str) -> list[str]:
    return [
        "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={run}", "train.steps=2",
        "schedule.total_steps=9", "monitor.peak_tflops=1", "memory.mode=per_token", *more,
    ]  # fmt: skip


def package(folder: Path, name: str, *points: str) -> Path:
    """Install a package with entry points; points: lines of entry_points.txt, with groups in brackets."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(points))
    return folder


def path_of(*folders: Path) -> str:
    """A PYTHONPATH of the folders and the repository."""
    return os.pathsep.join(map(str, (*folders, ROOT)))


def test_config_knows_the_names_of_every_registry() -> None:
    """The config has its own list of names, since it must not import torch."""
    assert tuple(MODES) == choices.MEMORY_MODES
    assert tuple(TRANSPORTS) == choices.X0_TRANSPORTS
    assert tuple(ENGINES) == choices.ENGINES
    assert tuple(WRITERS) == choices.WRITERS


def test_the_docs_show_what_is_tried_here() -> None:
    """The code blocks are identical to tests/extensions.py, imports included."""
    blocks = re.findall(r"```python\n(.*?)\n```", (ROOT / "docs/extending.md").read_text(), re.S)
    source = Path(extensions.__file__).read_text()
    assert blocks and all(block in source for block in blocks)
    shown = {name for block in blocks for name in re.findall(r"^class (\w+)", block, re.M)}
    assert shown == set(re.findall(r"^class (\w+)", source, re.M))


def test_a_memory_mode(data: Path, tmp_path: Path) -> None:
    mlm_train("pretrain", *pretrain(data, tmp_path / "run", "memory.mode=tests.extensions:RowByRow"))
    mlm_train("pretrain", *pretrain(data, tmp_path / "per_token"))
    same_losses(tmp_path / "run", tmp_path / "per_token", 1e-6)
    assert "memory.mode=tests.extensions:RowByRow" in (tmp_path / "run/train.log").read_text()


def test_a_memory_mode_as_the_page_tests_it(data: Path, tmp_path: Path) -> None:
    """The page's config and function, in the layouts that it names."""
    config = tmp_path / "tiny.yaml"
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    config.write_text(text.replace("tiny/data", str(data)))
    expected = extensions.losses_and_norms(config, tmp_path / "per_token", "memory.mode=per_token")
    assert len(expected) == 8
    for layout in (["parallel.pipeline=2"], ["parallel.tensor=2", "parallel.sequence=true"]):
        mode, run = "memory.mode=tests.extensions:RowByRow", tmp_path / layout[0]
        own = extensions.losses_and_norms(config, run, mode, *layout, processes=2)
        assert own == pytest.approx(expected, rel=1e-5)
    doubled = extensions.losses_and_norms(config, tmp_path / "doubled", "memory.mode=tests.doubled:Doubled")
    assert doubled[0] == expected[0] and doubled != pytest.approx(expected, rel=1e-4)


def test_a_transport_between_two_stages_of_two_tensor_ranks(data: Path, tmp_path: Path) -> None:
    layout = ("parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true")
    own = (*layout, "parallel.x0_transport=tests.extensions:SendRecv")
    finished("launch", "--nproc", 4, *pretrain(data, tmp_path / "run", *own))
    mlm_train("pretrain", *pretrain(data, tmp_path / "alone"))
    same_losses(tmp_path / "run", tmp_path / "alone")


def test_an_engine_on_two_ranks_whose_checkpoint_the_other_one_goes_on_from(
    data: Path, tmp_path: Path
) -> None:
    own, run = "parallel.engine=tests.extensions:PlainAdamW", tmp_path / "run"
    finished("launch", "--nproc", 2, *pretrain(data, run, own))
    for engine, steps in (("parallel.engine=deepspeed", 4), (own, 6)):
        mlm_train("pretrain", *pretrain(data, run, engine, f"train.steps={steps}"))
    changed = "changed since that checkpoint: parallel.engine deepspeed -> tests.extensions:PlainAdamW"
    assert changed in (run / "train.log").read_text()
    mlm_train("pretrain", *pretrain(data, tmp_path / "deepspeed", "train.steps=6"))
    for tag in ("train/loss", "train/grad_norm"):
        expected = scalars(tmp_path / "deepspeed", tag)
        assert scalars(run, tag) == pytest.approx(expected, rel=2e-5) and len(expected) == 6


def test_a_callback_and_a_writer(data: Path, tmp_path: Path) -> None:
    run, writer = tmp_path / "run", "monitor.writers=[tests.extensions:CsvWriter]"
    added = ("monitor.callbacks=[tests.extensions:LowestLoss]", writer)
    mlm_train("pretrain", *pretrain(data, run, *added))
    mlm_train("pretrain", *pretrain(data, run, *added, "train.steps=3"))
    rows = list(csv.reader((run / "metrics.csv").read_text().splitlines()))
    lowest = [(int(step), float(value)) for step, tag, value in rows if tag == "train/lowest_loss"]
    assert [step for step, _ in lowest] == [1, 2, 3]
    lines = (run / "train.log").read_text().splitlines()
    assert lines[-1].endswith(f"lowest loss {lowest[-1][1]:.4f}")
    assert not (run / "tensorboard").exists()


def test_a_storage_is_built_into_on_ray_and_read(tmp_path: Path) -> None:
    exported = export(tmp_path / "model", random_model())
    point = "scratch = tests.extensions:Scratch"
    added = package(tmp_path / "path", "scratch-store", "[mlm_train.storages]", point)
    there = {"PYTHONPATH": path_of(added), "SCRATCH": str(tmp_path / "scratch")}
    finished("tol", "build", exported, "--output", "scratch://tol", "--partitions", 3, **there)
    assert (tmp_path / "scratch" / "tol" / INDEX).is_file()
    finished("tol", "verify", "scratch://tol", **there)
    finished("tol", "fetch", "scratch://tol", tmp_path / "copy", **there)
    mlm_train("tol", "verify", tmp_path / "copy", "--model", exported)
    assert "there is no scratch://" in refused("tol", "verify", "scratch://tol")
    point = "count-rows = tests.extensions:CountRows"
    package(added, "row-count", "[mlm_train.commands]", point)
    assert finished("count-rows", "scratch://tol", **there) == "601 rows\n"


def test_a_command_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = "count-rows = tests.extensions:CountRows"
    monkeypatch.syspath_prepend(package(tmp_path, "row-count", "[mlm_train.commands]", point))
    mlm_train("--help")
    text = capsys.readouterr().out
    assert "count-rows" in text and "added by row-count" in text
    mlm_train("count-rows", "--help")
    assert "folder or URL of a ToL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("point", "word", "line"),
    [
        (
            "tol = tests.extensions:CountRows",
            "new",
            "row-count adds tol to mlm_train.commands, which is there",
        ),
        (
            "rows = tests.nowhere:R",
            "rows",
            "tests.nowhere:R, which row-count adds as rows, cannot be imported",
        ),
        ("rows = tests.extensions:Scratch", "rows", "tests.extensions:Scratch is no command: it has no HELP"),
    ],
)
def test_bad_entry_points_are_one_line_and_leave_our_commands_alone(
    point: str, word: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package(tmp_path, "row-count", "[mlm_train.commands]", point))
    assert line in refused(word)
    mlm_train("doctor", "--help")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("memory.mode=nowhere:Mode", "=nowhere:Mode: there is no module nowhere: install its package"),
        ("memory.mode=tests.extensions:Mode", "has no Mode"),
        ("parallel.engine=tests.extensions:RowByRow", "is not a class derived from mlm_train.parallel."),
        ("monitor.callbacks=[tests.extensions:CsvWriter]", "is not a class derived from mlm_train.monitor."),
        ("monitor.callbacks=[tests.extensions:ROOT]", "has no ROOT"),
        ("monitor.callbacks=[LowestLoss]", 'input should be a class of yours as "package'),
        ("monitor.writers=[tests:__name__]", "__name__ is not a class"),
        ("monitor.writers=[tensorbord]", "input should be 'tensorboard', 'jsonl', 'wandb' or a class"),
        ("monitor.writers=[tests.broken:Writer]", "tests.broken cannot be imported: ValueError: on the way"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing_are_one_line_before_any_rank_starts(
    override: str, line: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests

    (tmp_path / "broken.py").write_text("raise ValueError('on the way')")
    monkeypatch.setattr(tests, "__path__", [*tests.__path__, str(tmp_path)])
    for words in (("pretrain",), ("launch", "--nproc", "2")):
        assert line in refused(*words, *pretrain(data, tmp_path / "run", override))
    assert not (tmp_path / "run").exists()
