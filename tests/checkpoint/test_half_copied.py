"""A half-copied checkpoint or export: one line wherever it is read, and nothing is written."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlm_train.parallel import runtime
from tests.commands import TINY, mlm_train, refused

NEWEST = "step-00000002"


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A refused run in this process must not disturb the next."""
    yield
    runtime.stop()


def pretrain(data: Path, output: Path, *more: str) -> list[str]:
    paths = (f"data.path={data}", f"train.output={output}")
    return ["pretrain", "configs/micro.yaml", *TINY, *paths, "train.steps=2", *more]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with two checkpoints."""
    run = tmp_path_factory.mktemp("half") / "run"
    mlm_train(*pretrain(data, run, "checkpoint.interval=1"))
    return run


def weights_of(folder: Path) -> Path:
    """The largest weights file."""
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def cut(file: Path) -> None:
    """Truncate a file to its first half."""
    contents = file.read_bytes()
    file.write_bytes(contents[: len(contents) // 2])


HALVES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file missing": (lambda folder: weights_of(folder).unlink(), ".safetensors is missing"),
    "a file short": (lambda folder: cut(weights_of(folder)), "bytes instead of"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut": (lambda folder: cut(folder / "manifest.json"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("half", HALVES)
def test_checkpoint(
    trained: Path, data: Path, tmp_path: Path, half: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "copy"))
    damage, words = HALVES[half]
    damage(run / "checkpoints" / NEWEST)
    for path in (run, run / "checkpoints" / NEWEST):
        for command in (
            ("checkpoint", "verify", path),
            ("export", path, "--output", tmp_path / "new"),
            pretrain(data, tmp_path / "new", f"checkpoint.warm_start={path}"),
        ):
            line = refused(*command)
            assert words in line and NEWEST in line, command
    capsys.readouterr()
    mlm_train("checkpoint", "list", run, "--json")
    assert words in capsys.readouterr().out
    assert words in refused("checkpoint", "prune", run)
    assert not (tmp_path / "new").exists() and (run / "checkpoints" / "step-00000001").is_dir()


def test_export(trained: Path, data: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    mlm_train("export", trained, "--output", export)
    start = pretrain(data, tmp_path / "new", f"checkpoint.warm_start={export}")
    cut(export / "model.safetensors")
    assert "model.safetensors is damaged" in refused(*start)
    (export / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(*start)
    cut(export / "config.json")
    assert "config.json is not JSON" in refused(*start)
    (export / "config.json").unlink()
    assert "holds no checkpoint" in refused(*start)
    assert not (tmp_path / "new").exists()
