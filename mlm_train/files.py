"""Writing files so that a kill or a full disk never leaves half of one under its final name."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlm_train.errors import UserError


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read once from start to end."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_used(path: Path) -> None:
    """UserError when an output folder exists and holds something: nothing is overwritten."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is not empty; give a new folder, or remove it")


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or missing rights while writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written: {reason}; free space or choose another place") from error
