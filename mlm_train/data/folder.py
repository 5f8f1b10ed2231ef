"""Output folders that appear complete or not at all, and hashes of files."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlm_train.errors import UserError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output` to write into; renamed to `output` when the block ends well.

    An error removes it; a killed process leaves only `NAME.partial-*` behind, never `output`.
    Raises UserError if `output` exists and is not an empty folder, or cannot be written.
    """
    output = output.absolute()
    _refuse_existing(output)
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _flush_to_disk(partial)
        partial.rename(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}; free some space or change --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_fraction(text: bytes, purpose: bytes) -> float:
    """A number in [0, 1) that depends on the text alone, independent from one purpose to another."""
    digest = hashlib.sha256(purpose + b"\0" + text).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float, below 1


def _refuse_existing(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if os.path.lexists(output):
        raise UserError(f"{output} exists already and nothing is overwritten; remove it or change --output")


def _flush_to_disk(folder: Path) -> None:
    """fsync every file, so that the rename never overtakes the contents in a power cut."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
