"""A run of two steps: its command line, and copies of its folder to damage."""

import shutil
from pathlib import Path

from tests.commands import TINY

CONFIG = "configs/micro.yaml"


def pretrain(data: Path, output: Path, *more: str) -> list[str]:
    """The command line of a run."""
    return [
        "pretrain", CONFIG, *TINY, f"data.path={data}", f"train.output={output}", "train.steps=2",
        "schedule.total_steps=9", *more,
    ]  # fmt: skip


def snapshot(folder: Path) -> dict[str, bytes]:
    """The contents of all files, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_of(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))
