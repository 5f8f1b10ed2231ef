"""Checkpoints of a run on disk: step-00000100/ folders, a `latest` pointer, keep-last-k.

A folder is committed by one rename after its manifest is written, so every step-* folder is whole.
The newest of them is what a run resumes from; `latest` repeats its name for people and scripts.
"""

import shutil
from pathlib import Path

from mlm_train.checkpoint.manifest import MANIFEST
from mlm_train.errors import UserError
from mlm_train.files import sync, write_text

LATEST = "latest"
PARTIAL = ".partial-"


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"step-{step:08d}"


def committed(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = [path for path in root.glob("step-*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(root: Path) -> Path | None:
    """The checkpoint to resume from."""
    found = committed(root)
    return found[-1] if found else None


def resolve(path: Path) -> Path:
    """A checkpoint folder from a user's path: itself, a checkpoints folder, or a run's."""
    if (path / MANIFEST).is_file():
        return path
    for root in (path, path / "checkpoints"):
        found = newest(root)
        if found is not None:
            return found
    raise UserError(f"{path} holds no checkpoint: give a run's folder or one of its step-* folders")


def commit(partial: Path, final: Path, keep: int) -> None:
    """Turn a written folder into the newest checkpoint, point `latest` at it, drop the oldest."""
    root = final.parent
    partial.rename(final)
    sync(root)
    write_text(root / LATEST, final.name + "\n")
    for old in committed(root)[:-keep]:
        shutil.rmtree(old)
    for leftover in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
