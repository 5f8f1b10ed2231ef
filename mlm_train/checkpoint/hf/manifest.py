"""The manifest of an export: its files with sizes and SHA-256, and its own checksum. Written last.

transformers ignores the file. A folder without one, such as a plain Hugging Face model or an older export,
cannot be verified.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from mlm_train.checkpoint.manifest import size_fault
from mlm_train.errors import UserError
from mlm_train.utils.checks import Check
from mlm_train.utils.files import listed, sha256_of
from mlm_train.utils.records import SEAL, FileRecord, Record, read_json, record_of, seal_of, write_sealed

MANIFEST = "export.manifest.json"
FIX = f"export or copy it again; if you changed it yourself, delete {MANIFEST}"
_HASH_THREADS = 4


class ExportManifest(Record):
    """The contents of export.manifest.json, without its own checksum."""

    format: Literal["mlm-export"] = "mlm-export"
    version: Literal[1] = 1
    files: list[FileRecord]


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files now in a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    hashes = digests(files)
    entries = [
        FileRecord(file=path.name, bytes=path.stat().st_size, sha256=hashes[path.name]) for path in files
    ]
    write_sealed(folder / MANIFEST, ExportManifest(files=entries).model_dump(mode="json"))


def read_manifest(folder: Path) -> ExportManifest | None:
    """A folder's manifest; None where it has none. UserError for one that was changed."""
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
    """Compare an export's files with its manifest. Returns SHA-256 by name for check="full", else nothing.

    used: files that will be read, which the manifest must list. around: where links may lead (files.listed).
    Raises UserError naming the first file that differs.
    """
    manifest = None if check == "none" else read_manifest(folder)
    if manifest is None:
        return {}
    known = {entry.file: entry for entry in manifest.files}
    paths = [listed(folder, name, MANIFEST, around) for name in known]
    for path in used:
        if path.name not in known:
            raise UserError(f"{path} is not in {MANIFEST}: it was added later; {FIX}")
    for path in paths:
        if fault := size_fault(path, known[path.name]):
            raise UserError(f"{fault}; {FIX}")
    if check == "sizes":
        return {}
    hashes = digests(paths)
    for name, digest in hashes.items():
        if digest != known[name].sha256:
            raise UserError(f"{folder / name} is damaged: its SHA-256 differs; {FIX}")
    return hashes


def digests(files: list[Path]) -> dict[str, str]:
    """SHA-256 of files by name, computed by several threads."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return dict(zip((file.name for file in files), pool.map(sha256_of, files), strict=True))
