"""The manifest of a checkpoint: its progress, data, config and files. Written last, checked first.

It has its own checksum, so that a changed digit is found as damage instead of moving the data cursor.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from mlm_train.checkpoint.digests import ShardRecord, first_fault, hashed, units
from mlm_train.errors import UserError
from mlm_train.utils.files import finished, listed
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
VERSION = 4
# Version 1 had no checksum of the manifest; in version 2 a file held one part of a tensor, under its name;
# version 3 had no index, and the SHA-256 of whole files instead of blocks.
READABLE = (2, 3, VERSION)


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
    version: Literal[2, 3, 4]
    tool: str
    progress: Reached
    validation: Validation | None = None  # where the weights were evaluated
    data: TrainedOn
    config: dict[str, Any]  # of the run, for config.load.parse_config
    world: Annotated[Count, Field(ge=1)]
    files: Annotated[list[ShardRecord], Field(min_length=1)]
    index: FileRecord | None = None  # what is where in them; since version 4

    @model_validator(mode="after")
    def _has_its_index(self) -> Self:
        if (self.version >= 4) != (self.index is not None):
            raise ValueError("index: must be there since version 4, and in no older one")
        return self

    @property
    def every_file(self) -> list[FileRecord]:
        """All files but the manifest itself."""
        return [*self.files, *([] if self.index is None else [self.index])]


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
    path = folder / MANIFEST
    if not path.is_file():
        return parse_manifest(None, folder)
    try:
        return parse_manifest(read_regular(path), folder)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def parse_manifest(data: bytes | None, folder: Path | str) -> Manifest:
    """read_manifest of the bytes of a manifest (None: there is none) in a folder, or at a URL."""
    path = f"{folder}/{MANIFEST}"
    if data is None:
        raise damaged(folder, f"{folder} is not a complete {FORMAT} folder: {MANIFEST} is missing")
    try:
        tree = json_value(data)
    except ValueError:
        raise damaged(folder, f"{path} is damaged: it is not JSON") from None
    if not isinstance(tree, dict):
        raise damaged(folder, f"{path} is damaged: it does not describe a {FORMAT}")
    seal = tree.pop(SEAL, None)
    described = tree.get("format"), tree.get("version")
    if seal != seal_of(tree) and (seal is not None or described in [(FORMAT, v) for v in READABLE]):
        raise damaged(folder, f"{path} is damaged: its checksum differs")
    if described[0] != FORMAT:
        raise UserError(f"{path} does not describe a {FORMAT}")
    if described[1] not in READABLE:
        versions = ", ".join(map(str, READABLE))
        raise UserError(
            f"{path} has version {str(described[1])[:80]}, but this program reads {versions}: use the other"
        )
    return record_of(Manifest, tree, path, _fix(folder))


def verify_files(folder: Path, manifest: Manifest, hashes: bool = True) -> None:
    """Check presence, size and (with `hashes`) content of files; Damaged names the first bad one.

    A file that no entry names is rejected too: it is no part of what was committed.
    """
    entries = manifest.every_file
    for entry in entries:
        if (fault := size_fault(listed(folder, entry.file, MANIFEST), entry)) is not None:
            raise damaged(folder, fault)
    if hashes and (fault := first_fault(folder, entries, finished(hashed(folder, entries, units(entries))))):
        raise damaged(folder, fault)
    unknown = {path.name for path in folder.glob("*.safetensors")} - {entry.file for entry in entries}
    if unknown:
        raise UserError(
            f"{folder / min(unknown)} is not in {MANIFEST} and not part of the checkpoint: delete it"
        )


def damaged(folder: Path | str, fault: str) -> Damaged:
    """The error for a checkpoint with a damaged file."""
    return Damaged(fault, _fix(folder))


def _fix(folder: Path | str) -> str:
    return f"delete {folder} to fall back to an older one"


def size_fault(path: Path, entry: FileRecord) -> str | None:
    """What is wrong with a file by its presence and size alone, naming it; None: nothing."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == entry.bytes else f"{path} is damaged: {size} bytes instead of {entry.bytes}"
