"""The manifest of a checkpoint: its progress, data, config and files. Written last, checked first.

It has its own checksum, so that a changed digit is found as damage instead of moving the data cursor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mlm_train.errors import UserError
from mlm_train.utils.files import listed, sha256_of
from mlm_train.utils.records import (
    SEAL,
    Count,
    FileRecord,
    Record,
    json_value,
    read_regular,
    record_of,
    seal_of,
    write_sealed,
)

MANIFEST = "manifest.json"
FORMAT = "mlm-checkpoint"
VERSION = 2  # version 1 had no checksum of the manifest


class Rewarmed(Record):
    """A change of the learning rate schedule; see monitor.report.Rewarm."""

    step: Count
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    steps: Annotated[Count, Field(ge=1)]


class Reached(Record):
    """Progress of the run (see monitor.report.Progress) and of the optimizer; older versions have less."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Count | float | None]
    step: Count
    samples: Count
    tokens: Count
    skipped: Count = 0
    rollbacks: Count = 0
    rewarm: Rewarmed | None = None
    optimizer_steps: Count


class TrainedOn(Record):
    """The training data. order: version of the sample order (data.order.ORDER), absent in older versions.

    bos_id: what each document begins with, if anything.
    """

    model_config = ConfigDict(extra="allow")
    fingerprint: str
    eod_id: Count
    bos_id: Count | None = None
    order: Count | None = None


class Validation(Record):
    """Validation loss of a checkpoint's weights, on the first `samples` samples of the split."""

    loss: Annotated[float, Field(allow_inf_nan=False)]
    samples: Count


class Manifest(Record):
    """The contents of manifest.json, without its own checksum."""

    format: Literal["mlm-checkpoint"]
    version: Literal[2]
    tool: str
    progress: Reached
    validation: Validation | None = None  # where the weights were evaluated
    data: TrainedOn
    config: dict[str, Any]  # of the run, for config.load.parse_config
    world: Annotated[Count, Field(ge=1)]
    files: Annotated[list[FileRecord], Field(min_length=1)]


class Damaged(UserError):
    """A folder differs from what was committed; `fault` is the message without the fix."""

    def __init__(self, fault: str, fix: str) -> None:
        super().__init__(f"{fault}; {fix}")
        self.fault = fault


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with its own checksum, atomically."""
    write_sealed(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest. UserError for another format or version, Damaged where it was changed."""
    path, fix = folder / MANIFEST, f"delete {folder} to fall back to an older one"
    if not path.is_file():
        raise Damaged(f"{folder} is not a complete {FORMAT} folder: {MANIFEST} is missing", fix)
    try:
        tree = json_value(read_regular(path))
    except ValueError:
        raise Damaged(f"{path} is damaged: it is not JSON", fix) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise Damaged(f"{path} is damaged: it does not describe a {FORMAT}", fix)
    seal = tree.pop(SEAL, None)
    described = tree.get("format"), tree.get("version")
    if seal != seal_of(tree) and (seal is not None or described == (FORMAT, VERSION)):
        raise Damaged(f"{path} is damaged: its checksum differs", fix)
    if described[0] != FORMAT:
        raise UserError(f"{path} does not describe a {FORMAT}")
    if described[1] != VERSION:
        raise UserError(
            f"{path} has version {str(described[1])[:80]}, but this program reads {VERSION}: use the other"
        )
    return record_of(Manifest, tree, path, fix)


def verify_files(folder: Path, entries: Sequence[FileRecord], hashes: bool = True) -> None:
    """Check presence, size and (with `hashes`) content of files; Damaged names the first bad one.

    A file that no entry names is rejected too: its tensors would be read with the others.
    """
    fix = f"delete {folder} to fall back to an older one"
    for entry in entries:
        path = listed(folder, entry.file, MANIFEST)
        if fault := size_fault(path, entry):
            raise Damaged(fault, fix)
        try:
            same = not hashes or sha256_of(path) == entry.sha256
        except OSError as error:  # the file may be whole: not Damaged
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if not same:
            raise Damaged(f"{path} is damaged: its checksum differs", fix)
    unknown = {path.name for path in folder.glob("*.safetensors")} - {entry.file for entry in entries}
    if unknown:
        raise UserError(
            f"{folder / min(unknown)} is not in {MANIFEST} and not part of the checkpoint: delete it"
        )


def size_fault(path: Path, entry: FileRecord) -> str | None:
    """What is wrong with a file by its presence and size alone, naming it; None: nothing."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == entry.bytes else f"{path} is damaged: {size} bytes instead of {entry.bytes}"
