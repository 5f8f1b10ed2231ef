"""Checkpoints of a run on disk: step-00000100/ folders, `latest` and `best`; which of them stay says keep.py.

A folder is committed by one rename after its manifest is written, and renamed away before it is
deleted, so every step-* folder with a manifest is whole.
The newest of them is what a run resumes from; the files `latest` and `best` repeat names for people and
scripts, and nothing here reads them: RUN/best is the folder that has the lowest validation loss.
"""

import contextlib
import re
import shutil
from pathlib import Path

from mlm_train.checkpoint.keep import Keep, best_of, step_of
from mlm_train.checkpoint.manifest import MANIFEST
from mlm_train.errors import UserError
from mlm_train.utils.files import sync, write_text

LATEST, BEST = "latest", "best"
PARTIAL = ".partial-"
DAMAGED = "damaged-"
NAME = re.compile(r"step-\d{8,}")


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"step-{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """Folders of steps, oldest first, those without a manifest too."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def committed(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return [path for path in step_folders(root) if (path / MANIFEST).is_file()]


def newest(root: Path) -> Path | None:
    """The checkpoint to resume from."""
    found = committed(root)
    return found[-1] if found else None


def names_one(path: Path) -> bool:
    """Whether a user's path is RUN/best, RUN/latest, or the same in the run's checkpoints folder."""
    return path.name in (LATEST, BEST) and not path.is_dir()


def resolve(path: Path) -> Path:
    """A checkpoint folder from a user's path: itself, or the newest of a checkpoints folder or of a run's.

    `best` and `latest` below these name one too. Nothing is taken for the newest because that is copied by
    half: reading its manifest will say so.
    """
    if (path / MANIFEST).is_file() or (path.is_dir() and NAME.fullmatch(path.name)):
        return path
    if path.name == BEST and names_one(path):
        best = best_of(_in(path.parent))
        if best is None:
            raise UserError(f"{path}: no checkpoint there has a validation loss (train.eval_interval)")
        return best
    return _in(path.parent if names_one(path) else path)[-1]


def _in(path: Path) -> list[Path]:
    """The checkpoints of a run's or a checkpoints folder; UserError where there is none."""
    for root in (path, path / "checkpoints"):
        if found := step_folders(root):
            return found
    raise UserError(f"{path} holds no checkpoint: give a run's folder or one of its step-* folders")


def commit(partial: Path, final: Path, keep: Keep) -> None:
    """Turn a written folder into the newest checkpoint, point `latest` at it, drop what is not to be kept.

    What follows the commit may fail, as on a full disk: the next one does it again.
    """
    root = final.parent
    if final.exists():  # without a manifest, or the run would have resumed from it
        delete(final)
    partial.rename(final)
    sync(root)
    with contextlib.suppress(OSError):
        for folder, reasons in keep.reasons(committed(root)).items():
            if not reasons:
                delete(folder)
        remove_partials(root)
        write_names(root, keep)


def write_names(root: Path, keep: Keep) -> None:
    """The files `latest`, and `best` where the best are kept."""
    found = committed(root)
    write_text(root / LATEST, found[-1].name + "\n")
    best = best_of(found) if keep.best else None
    if best is not None:
        write_text(root / BEST, best.name + "\n")
    else:
        (root / BEST).unlink(missing_ok=True)


def delete(folder: Path) -> None:
    """Take a folder's name away before its files go: a kill in between leaves nothing half deleted."""
    aside = folder.with_name(f"{PARTIAL}old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Take a damaged folder's name away, delete nothing; its new path."""
    times, aside = 1, folder.with_name(f"{DAMAGED}{folder.name}")
    while aside.exists():
        times += 1
        aside = folder.with_name(f"{DAMAGED}{folder.name}-{times}")
    folder.rename(aside)
    sync(folder.parent)
    return aside


def remove_partials(root: Path) -> None:
    """Delete what killed saves and deletions left. Only for the process that holds the run's lock."""
    for leftover in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
