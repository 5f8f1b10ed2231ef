"""The manifest of an export: its files, their sizes and SHA-256, under a seal. Written last.

transformers passes the file over. A folder without one, as of a plain Hugging Face model or an older export,
has nothing to be compared with.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from mlm_train.checkpoint.manifest import FileEntry
from mlm_train.errors import UserError
from mlm_train.utils.checks import Check
from mlm_train.utils.files import listed, sha256_of, write_json
from mlm_train.utils.records import SEAL, Record, read_json, record_of, seal_of

MANIFEST = "export.manifest.json"
FIX = f"export or copy it again; where the change is yours, delete {MANIFEST}"
_HASHED_AT_ONCE = 4  # files


class ExportManifest(Record):
    """What it says."""

    format: Literal["mlm-export"] = "mlm-export"
    version: Literal[1] = 1
    files: list[FileEntry]


def write_manifest(folder: Path) -> None:
    """Of all files that lie there now."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = digests(files)
    entries = [
        FileEntry(file=path.name, bytes=path.stat().st_size, sha256=found[path.name]) for path in files
    ]
    tree = ExportManifest(files=entries).model_dump(mode="json")
    write_json(folder / MANIFEST, tree | {SEAL: seal_of(tree)})


def read_manifest(folder: Path) -> ExportManifest | None:
    """The manifest of a folder, None where it has none. UserError for one that was changed."""
    file = folder / MANIFEST
    if not file.exists():
        return None
    tree = read_json(file, FIX)
    seal = tree.pop(SEAL, None)
    manifest = record_of(ExportManifest, tree, file, FIX)
    if seal != seal_of(tree):
        raise UserError(f"{file} is damaged: its checksum differs; {FIX}")
    return manifest


def verify_export(
    folder: Path, check: Check, used: Iterable[Path] = (), around: Path | None = None
) -> Mapping[str, str]:
    """Compare an export's files with its manifest; SHA-256 by name, where they were compared.

    used: files that are read, which the manifest must name. around: where links may lead (files.listed).
    Raises UserError naming the first file that is not what was written.
    """
    manifest = None if check == "none" else read_manifest(folder)
    if manifest is None:
        return {}
    known = {entry.file: entry for entry in manifest.files}
    paths = [listed(folder, name, MANIFEST, around) for name in known]
    for path in used:
        if path.name not in known:
            raise UserError(f"{path} is not in {MANIFEST}: it came later; {FIX}")
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing; {FIX}")
        if (size := path.stat().st_size) != known[path.name].bytes:
            raise UserError(f"{path} is damaged: {size} bytes instead of {known[path.name].bytes}; {FIX}")
    if check == "sizes":
        return {}
    found = digests(paths)
    for name, digest in found.items():
        if digest != known[name].sha256:
            raise UserError(f"{folder / name} is damaged: its SHA-256 differs; {FIX}")
    return found


def digests(files: list[Path]) -> dict[str, str]:
    """SHA-256 of files by name, several at a time."""
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return dict(zip((file.name for file in files), pool.map(sha256_of, files), strict=True))
