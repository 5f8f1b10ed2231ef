"""Checkpoints of a run on disk: step-00000100/ folders, `latest` and `best`. keep.py decides which are kept.

A folder is committed by one rename after its manifest is written, and renamed away before it is
deleted, so every step-* folder with a manifest is whole.
A run resumes from the newest one. The files `latest` and `best` name folders for people and scripts only;
a path RUN/best is resolved by comparing validation losses.
"""

import contextlib
import re
import shutil
from pathlib import Path

from mlm_train.checkpoint.keep import Keep, Manifests, best_of, step_of
from mlm_train.checkpoint.manifest import MANIFEST
from mlm_train.errors import UserError
from mlm_train.utils.files import sync, write_text, writing
from mlm_train.utils.urls import url_in

LATEST, BEST = "latest", "best"
PARTIAL = ".partial-"
DAMAGED = "damaged-"
NAME = re.compile(r"step-\d{8,}")


def step_folder(root: Path, step: int) -> Path:
    """The folder of a step."""
    return root / f"step-{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first, also those without a manifest."""
    return sorted((path for path in root.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


def committed(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return [path for path in step_folders(root) if (path / MANIFEST).is_file()]


def newest(root: Path) -> Path | None:
    """The newest committed checkpoint, from which a run resumes; None where there is none."""
    folders = committed(root)
    return folders[-1] if folders else None


def names_one(path: Path) -> bool:
    """Whether a user's path is `best` or `latest` below a run or its checkpoints folder."""
    return path.name in (LATEST, BEST) and not path.is_dir()


def make_partial(partial: Path, size: int) -> int | None:
    """Make an empty folder for so many bytes. Where fewer are free: returns how many, and makes none."""
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial.parent):
        partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free >= size:
        return None
    partial.rmdir()
    return free


def refuse_url(path: str | Path) -> None:
    """Raise UserError for a URL where a model's folder is needed."""
    if (url := url_in(path)) is not None:
        raise UserError(
            f"{url} is a URL; give a folder. `mlm-train checkpoint fetch {url} FOLDER` copies a checkpoint"
        )


def resolve(path: Path) -> Path:
    """Resolve a user's path to a checkpoint folder: itself, or the newest of a run or a checkpoints folder.

    `best` and `latest` below a run or a checkpoints folder are resolved too. A half-copied newest checkpoint
    is not skipped: reading its manifest reports it. Raises UserError where there is no checkpoint.
    """
    refuse_url(path)
    if (path / MANIFEST).is_file() or (path.is_dir() and NAME.fullmatch(path.name)):
        return path
    if path.name == BEST and names_one(path):
        best = best_of(_folders_of(path.parent), Manifests())
        if best is None:
            raise UserError(f"{path}: no checkpoint there has a validation loss (train.eval_interval)")
        return best
    return _folders_of(path.parent if names_one(path) else path)[-1]


def _folders_of(path: Path) -> list[Path]:
    """The checkpoint folders in a run's or a checkpoints folder. UserError where there is none."""
    for root in (path, path / "checkpoints"):
        if folders := step_folders(root):
            return folders
    raise UserError(f"{path} holds no checkpoint: give a run's folder or one of its step-* folders")


def commit(partial: Path, final: Path, keep: Keep) -> None:
    """Rename a written folder to its final name, update `latest`, `best`, delete checkpoints no longer kept.

    What follows the rename may fail, as on a full disk; the next commit repeats it.
    """
    root = final.parent
    if final.exists():  # it has no manifest, else the run would have resumed from it
        delete(final)
    partial.rename(final)
    sync(root)
    with contextlib.suppress(OSError):
        manifests = Manifests()
        kept = keep.reasons(committed(root), manifests)
        named = write_names(root, keep, manifests)  # first, so that none names a folder that is deleted
        for folder, reasons in kept.items():
            if not reasons:
                delete(folder)
        remove_partials(root)
        if not named:
            write_names(root, keep, manifests)


def write_names(root: Path, keep: Keep, manifests: Manifests) -> bool:
    """Write the files `latest`, and `best` where the best are kept. Returns whether they could be written.

    A name that cannot be written is removed: it may soon be that of a deleted folder.
    """
    folders = committed(root)
    best = best_of(folders, manifests) if keep.best else None
    names = {LATEST: folders[-1], BEST: best}
    written = True
    for name, folder in names.items():
        try:
            if folder is not None:
                write_text(root / name, folder.name + "\n")
                continue
        except OSError:
            written = False
        (root / name).unlink(missing_ok=True)
    return written


def delete(folder: Path) -> None:
    """Delete a folder; it is renamed first, so that a kill never leaves one half deleted under its name."""
    doomed = folder.with_name(f"{PARTIAL}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder, without deleting anything. Returns its new path."""
    times, aside = 1, folder.with_name(f"{DAMAGED}{folder.name}")
    while aside.exists():
        times += 1
        aside = folder.with_name(f"{DAMAGED}{folder.name}-{times}")
    folder.rename(aside)
    sync(folder.parent)
    return aside


def remove_partials(root: Path) -> None:
    """Delete the leftovers of killed saves and deletions. Only for the process that holds the run's lock."""
    for leftover in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
