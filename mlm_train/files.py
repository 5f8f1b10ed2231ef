"""Writing files so that a kill or a full disk never leaves half of one under its final name."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlm_train.errors import UserError


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read once from start to end."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_used(path: Path) -> None:
    """UserError when an output folder exists and holds something: nothing is overwritten."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and nothing is overwritten; remove it or name a new folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output` to write into; renamed to `output` when the block ends well.

    An error removes it; a killed process leaves only `NAME.partial-*` behind, never `output`.
    Raises UserError if `output` exists and is not an empty folder, or cannot be written.
    """
    output = output.absolute()
    refuse_used(output)
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex[:8]}")
    with writing(output):
        try:
            partial.mkdir(parents=True)
            yield partial
            for path in (*partial.iterdir(), partial):
                sync(path)
            partial.rename(output)
            sync(output.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft_of(path: Path) -> Path:
    """Where write_text puts a file before it takes its name."""
    return path.with_name(f".{path.name}.writing")


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old text or the new one, whole."""
    draft = draft_of(path)
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.rename(path)
    sync(path.parent)


def write_json(path: Path, tree: Any) -> None:
    """write_text of a JSON value."""
    write_text(path, json.dumps(tree, indent=1) + "\n")


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder for one process at a time; the lock goes with the process, however it ends.

    Raises UserError where another process holds it; `doing` says what that one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder} is {doing} by another process; wait for it or name another") from None
    except OSError:
        pass  # some shared file systems have no locks; unfinished files have names of their own anyway
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or missing rights while writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written: {reason}; free space or choose another place") from error
