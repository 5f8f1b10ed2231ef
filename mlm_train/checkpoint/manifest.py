"""The manifest: what a committed folder holds, file by file. Written last, checked first.

It carries a checksum of itself, so a changed digit in it is damage too, and not another place in the data.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlm_train.errors import UserError
from mlm_train.files import listed, sha256_of, write_json
from mlm_train.records import SEAL, json_value, read_regular, seal_of

MANIFEST = "manifest.json"
FORMAT = "mlm-checkpoint"
VERSION = 2  # 1 had no checksum of the manifest


class Damaged(UserError):
    """A folder is not what was committed; `fault` says what is wrong, without the fix."""

    def __init__(self, fault: str, fix: str) -> None:
        super().__init__(f"{fault}; {fix}")
        self.fault = fault


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it with its checksum, all at once."""
    write_json(folder / MANIFEST, manifest | {SEAL: seal_of(manifest)})


def read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """The manifest of a folder; UserError where it is of another kind or version, Damaged where changed."""
    path, fix = folder / MANIFEST, f"delete {folder} to fall back to an older one"
    if not path.is_file():
        raise Damaged(f"{folder} is no complete {kind} folder: {MANIFEST} is missing", fix)
    try:
        manifest = json_value(read_regular(path))
    except ValueError:
        raise Damaged(f"{path} is damaged: it is not JSON", fix) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(manifest, dict):
        raise Damaged(f"{path} is damaged: it does not describe a {kind}", fix)
    seal = manifest.pop(SEAL, None)
    described = manifest.get("format"), manifest.get("version")
    if seal != seal_of(manifest) and (seal is not None or described == (kind, version)):
        raise Damaged(f"{path} is damaged: its checksum differs", fix)
    if described[0] != kind:
        raise UserError(f"{path} does not describe a {kind}")
    if described[1] != version:
        raise UserError(
            f"{path} has version {described[1]}; this program reads {version}: go on with the other"
        )
    return manifest


def verify_files(folder: Path, entries: Iterable[dict[str, Any]], hashes: bool = True) -> None:
    """Check presence, size and (with `hashes`) content of files; Damaged names the first bad one.

    Tensors in a file that no entry names would be read with the others: it is refused too.
    """
    entries, fix = list(entries), f"delete {folder} to fall back to an older one"
    for entry in entries:
        path = listed(folder, entry["file"], MANIFEST)
        if not path.is_file():
            raise Damaged(f"{path} is missing", fix)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise Damaged(f"{path} is damaged: {size} bytes instead of {entry['bytes']}", fix)
        try:
            same = not hashes or sha256_of(path) == entry["sha256"]
        except OSError as error:  # it may be whole: nothing to fall back from
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if not same:
            raise Damaged(f"{path} is damaged: its checksum differs", fix)
    unknown = {path.name for path in folder.glob("*.safetensors")} - {entry["file"] for entry in entries}
    if unknown:
        raise UserError(
            f"{folder / min(unknown)} is not in {MANIFEST} and no part of the checkpoint: delete it"
        )
