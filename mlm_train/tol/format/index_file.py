"""Reading and writing the index of a table."""

import hashlib
import json
from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.tol.format.index import FETCHED, INDEX, REBUILD, STATE, TableFile, TolIndex
from mlm_train.tol.storage.base import Storage, StorageReader
from mlm_train.tol.storage.local import LocalFolder, sha256_at
from mlm_train.tol.storage.urls import refuse_url
from mlm_train.utils.records import parse_json, record_of


def is_intact(storage: Storage, file: TableFile, by_size: bool = False) -> bool:
    """Whether a file exists with the size and SHA-256 of its entry; `by_size`: with the size alone."""
    return storage.size(file.file) == file.bytes and (by_size or sha256_at(storage, file.file) == file.sha256)


def read_index(folder: str | Path) -> TolIndex:
    """Read the index of a ToL folder. UserError for a missing, damaged or unknown one, and for a URL."""
    refuse_url(folder)
    return index_at(LocalFolder(Path(folder)))


def index_at(storage: Storage) -> TolIndex:
    """Read the index of a folder or URL."""
    return parse_index(index_bytes(storage), storage.at(INDEX))


def index_bytes(storage: StorageReader) -> bytes:
    """Read the file INDEX. UserError if it is missing, with the command that finishes an unfinished table."""
    if (data := storage.read(INDEX)) is not None:
        return data
    if storage.read(STATE) is not None:
        raise UserError(f"{storage} is unfinished: resume it by running the command that started it again")
    if storage.read(FETCHED) is not None:
        raise UserError(f"{storage} is unfinished: resume it by running the same `mlm-train tol fetch` again")
    raise UserError(f"{storage.at(INDEX)} does not exist; give the output of `mlm-train tol build`")


def parse_index(data: bytes, file: str) -> TolIndex:
    """Parse and check the contents of the file INDEX; `file` names it in errors."""
    tree = parse_json(data, file, REBUILD)
    digest = tree.pop("digest", None)
    index = record_of(TolIndex, tree, file, REBUILD)
    if digest is not None and digest != _digest(data, str(digest)):
        raise UserError(f"{file} is damaged or was edited: its digest differs; {REBUILD}")
    return index


def write_index(storage: Storage, index: TolIndex) -> None:
    """Write the file INDEX; call it once all other files are there."""
    tree = index.model_dump(mode="json") | {"digest": _NO_DIGEST}
    if index.embedding is None:
        del tree["embedding"]  # a key that earlier versions do not know
    if index.source.text is None:
        del tree["source"]["text"]  # as this one
    data = (json.dumps(tree, indent=2) + "\n").encode()
    storage.write(INDEX, data.replace(_NO_DIGEST.encode(), _digest(data, _NO_DIGEST).encode()))


def _digest(index: bytes, digest: str) -> str:
    """The SHA-256 of the index's bytes with zeros in place of the digest."""
    return hashlib.sha256(index.replace(digest.encode(), _NO_DIGEST.encode())).hexdigest()


_NO_DIGEST = "0" * 64
