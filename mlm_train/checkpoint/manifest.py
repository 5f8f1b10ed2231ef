"""The manifest: what a committed folder holds, file by file. Written last, checked first."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlm_train.errors import UserError
from mlm_train.files import sha256_of, sync

MANIFEST = "manifest.json"


def describe_file(folder: Path, name: str) -> dict[str, Any]:
    """The manifest's entry of one file; the file is flushed to disk first."""
    path = folder / name
    sync(path)
    return {"file": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def read_manifest(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """The manifest of a folder; UserError where it is missing, damaged or of another kind."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no complete {kind} folder: {MANIFEST} is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged: it is not JSON; use another {kind}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise UserError(f"{path} does not describe a {kind}")
    if manifest.get("version") != version:
        raise UserError(f"{path} has version {manifest.get('version')}; this program reads {version}")
    return manifest


def verify_files(folder: Path, entries: Iterable[dict[str, Any]], hashes: bool = True) -> None:
    """Check presence, size and (with `hashes`) content of files; UserError names the first bad one."""
    for entry in entries:
        name = entry["file"]
        if Path(name).name != name:
            raise UserError(f"{folder / MANIFEST} names {name!r}, which is not a file of that folder")
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: delete {folder} to fall back to an older one")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(
                f"{path} is damaged: {size} bytes instead of {entry['bytes']}; "
                f"delete {folder} to fall back to an older one"
            )
        if hashes and sha256_of(path) != entry["sha256"]:
            raise UserError(
                f"{path} is damaged: its checksum differs; delete {folder} to fall back to an older one"
            )
