"""Prepared data: a folder of token ids on disk, opened without reading them.

    FOLDER/train.bin, train.idx             token ids, and the boundaries of documents
    FOLDER/validation.bin, validation.idx   the same for evaluation
    FOLDER/tokenizer.model | tokenizer.json
    FOLDER/manifest.json                    sizes, hashes, counts, and a checksum of these; written last

`.bin` and `.idx` are Megatron's indexed dataset (megatron-core reads them too). Every document is
one sequence of the `.idx` and ends with `eod_id`.
"""

import hashlib
import os
from pathlib import Path

from mlm_train.data.checks import check_documents, check_sizes, check_tokenizer
from mlm_train.data.manifest import AGAIN, UNSEALED, DataManifest, fingerprint_of
from mlm_train.data.token_stream import TokenStream
from mlm_train.errors import UserError
from mlm_train.utils.checks import Check
from mlm_train.utils.files import listed, open_regular, sha256_of
from mlm_train.utils.records import (
    SEAL,
    FileRecord,
    json_value,
    read_regular,
    record_of,
    seal_of,
    write_sealed,
)

MANIFEST = "manifest.json"


class PreparedData:
    """A folder written by `mlm-train data prepare`, checked when opened."""

    def __init__(self, path: Path, manifest: DataManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.eod_id = manifest.eod_id
        self.bos_id = manifest.bos_id
        self.fingerprint = manifest.fingerprint

    @classmethod
    def open(cls, path: str | Path, verify: Check = "sizes") -> "PreparedData":
        """Open a folder and check the manifest, every file's size, the counts, and the tokenizer's hash.

        verify: "full" also reads every file (see `verify`), "none" checks the manifest alone. Raises
        UserError naming the file that is missing, truncated, changed or outside the folder.
        """
        path = Path(path)
        data = cls(path, _read_manifest(path))
        if verify == "none":
            return data
        for record in data._files():
            _check_size(listed(path, record.file, MANIFEST), record.bytes)
        for name, split in data.manifest.splits.items():
            check_sizes(path / MANIFEST, name, split, data.manifest.dtype)
        tokenizer = data.manifest.tokenizer
        if not listed(path, tokenizer.file, MANIFEST).is_file():
            raise UserError(f"{path / tokenizer.file} is missing; {AGAIN}")
        _check_hash(path / tokenizer.file, tokenizer.sha256, read_regular(path / tokenizer.file))
        if data.manifest.version == UNSEALED:
            check_tokenizer(path, path / MANIFEST, data.manifest)
        if verify == "full":
            data.verify()
        return data

    def split(self, name: str) -> TokenStream:
        """The tokens of `train` or `validation`."""
        record = self.manifest.splits.get(name)
        if record is None:
            raise UserError(f"{self.path} has no split {name!r}, only {', '.join(self.manifest.splits)}")
        return TokenStream(
            self.path / record.bin.file, self.path / record.idx.file, record, self.manifest.dtype
        )

    def verify(self) -> None:
        """Read every file: check SHA-256, documents, ids, tokenizer. UserError names what is wrong."""
        for record in self._files():
            _check_hash(self.path / record.file, record.sha256)
        check_tokenizer(self.path, self.path / MANIFEST, self.manifest)
        for name in self.manifest.splits:
            check_documents(self.split(name), self.vocab_size, self.eod_id, self.bos_id)

    def _files(self) -> list[FileRecord]:
        return [file for split in self.manifest.splits.values() for file in (split.bin, split.idx)]


def write_manifest(folder: Path, manifest: DataManifest) -> None:
    """Write manifest.json with its own checksum, atomically."""
    write_sealed(folder / MANIFEST, manifest.model_dump(mode="json"))


def _read_manifest(folder: Path) -> DataManifest:
    path = folder / MANIFEST
    try:
        tree = json_value(read_regular(path))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no prepared data ({MANIFEST} is missing); "
            f"write it with `mlm-train data prepare --output {folder} ...`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {AGAIN}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} does not describe prepared data; {AGAIN}")
    seal = tree.pop(SEAL, None)
    if seal != seal_of(tree) and (seal is not None or tree.get("version") != UNSEALED):
        raise UserError(f"{path} was changed: its checksum differs; {AGAIN}")
    manifest = record_of(DataManifest, tree, path, AGAIN)
    if manifest.fingerprint != fingerprint_of(manifest.tokenizer, manifest.eod_id, manifest.splits):
        raise UserError(f"{path} was changed: its fingerprint does not match its hashes; {AGAIN}")
    return manifest


def _check_size(path: Path, expected: int) -> None:
    try:
        with open_regular(path) as file:  # rather than stat: it must be readable too
            actual = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing ({expected} bytes expected); {AGAIN}") from None
    if actual != expected:
        raise UserError(f"{path} has {actual} bytes instead of {expected}; {AGAIN}")


def _check_hash(path: Path, expected: str, contents: bytes | None = None) -> None:
    """Raise UserError where a file's SHA-256 differs. contents: of the file, where already read."""
    actual = sha256_of(path) if contents is None else hashlib.sha256(contents).hexdigest()
    if actual != expected:
        raise UserError(
            f"{path} was changed: its SHA-256 is {actual[:12]}..., "
            f"the manifest has {expected[:12]}...; {AGAIN}"
        )
