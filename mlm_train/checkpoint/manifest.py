"""The manifest: what a committed folder holds, file by file. Written last, checked first.

It carries a checksum of itself, so a changed digit in it is damage too, and not another place in the data.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mlm_train.errors import UserError
from mlm_train.utils.files import listed, sha256_of, write_json
from mlm_train.utils.records import SEAL, Record, json_value, read_regular, record_of, seal_of

MANIFEST = "manifest.json"
FORMAT = "mlm-checkpoint"
VERSION = 2  # 1 had no checksum of the manifest
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class FileEntry(Record):
    """A file beside the manifest."""

    file: str
    bytes: Count
    sha256: str


class Rewarmed(Record):
    """A change of the learning rate's schedule, as monitor.report.Rewarm says it."""

    step: Count
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    steps: Annotated[Count, Field(ge=1)]


class Reached(Record):
    """How far the run was, as monitor.report.Progress says it, and the optimizer. Older versions say less."""

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
    """The data. order: how samples are chosen (data.order.ORDER); older versions did not say.

    bos_id: what each document begins with, if anything.
    """

    model_config = ConfigDict(extra="allow")
    fingerprint: str
    eod_id: Count
    bos_id: Count | None = None
    order: Count | None = None


class Validation(Record):
    """The loss of a checkpoint's weights, on so many samples of the validation split."""

    loss: Annotated[float, Field(allow_inf_nan=False)]
    samples: Count


class Manifest(Record):
    """What manifest.json says."""

    format: Literal["mlm-checkpoint"]
    version: Literal[2]
    tool: str
    progress: Reached
    validation: Validation | None = None  # where the weights were evaluated
    data: TrainedOn
    config: dict[str, Any]  # of the run, for config.load.parse_config
    world: Annotated[Count, Field(ge=1)]
    files: Annotated[list[FileEntry], Field(min_length=1)]


class Damaged(UserError):
    """A folder is not what was committed; `fault` says what is wrong, without the fix."""

    def __init__(self, fault: str, fix: str) -> None:
        super().__init__(f"{fault}; {fix}")
        self.fault = fault


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it with its checksum, all at once."""
    write_json(folder / MANIFEST, manifest | {SEAL: seal_of(manifest)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; UserError where it is of another kind or version, Damaged where changed."""
    path, fix = folder / MANIFEST, f"delete {folder} to fall back to an older one"
    if not path.is_file():
        raise Damaged(f"{folder} is no complete {FORMAT} folder: {MANIFEST} is missing", fix)
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
            f"{path} has version {str(described[1])[:80]}; this program reads {VERSION}: go on with the other"
        )
    return record_of(Manifest, tree, path, fix)


def verify_files(folder: Path, entries: Sequence[FileEntry], hashes: bool = True) -> None:
    """Check presence, size and (with `hashes`) content of files; Damaged names the first bad one.

    Tensors in a file that no entry names would be read with the others: it is refused too.
    """
    fix = f"delete {folder} to fall back to an older one"
    for entry in entries:
        path = listed(folder, entry.file, MANIFEST)
        if not path.is_file():
            raise Damaged(f"{path} is missing", fix)
        size = path.stat().st_size
        if size != entry.bytes:
            raise Damaged(f"{path} is damaged: {size} bytes instead of {entry.bytes}", fix)
        try:
            same = not hashes or sha256_of(path) == entry.sha256
        except OSError as error:  # it may be whole: nothing to fall back from
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if not same:
            raise Damaged(f"{path} is damaged: its checksum differs", fix)
    unknown = {path.name for path in folder.glob("*.safetensors")} - {entry.file for entry in entries}
    if unknown:
        raise UserError(
            f"{folder / min(unknown)} is not in {MANIFEST} and no part of the checkpoint: delete it"
        )
