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


def is_whole(storage: Storage, file: TableFile, by_size: bool = False) -> bool:
    """Whether a file is there with the contents that an index gives it; `by_size`: as its size shows."""
    return storage.size(file.file) == file.bytes and (by_size or sha256_at(storage, file.file) == file.sha256)


def read_index(folder: str | Path) -> TolIndex:
    """The index of a ToL folder; UserError for a missing, broken or unknown one, and for a URL."""
    refuse_url(folder)
    return index_at(LocalFolder(Path(folder)))


def index_at(storage: Storage) -> TolIndex:
    """The same of a folder or a URL."""
    return parse_index(index_bytes(storage), storage.at(INDEX))


def index_bytes(storage: StorageReader) -> bytes:
    """The file INDEX; UserError where there is none, which says whether the table is only unfinished."""
    if (data := storage.read(INDEX)) is not None:
        return data
    if storage.read(STATE) is not None:
        raise UserError(f"{storage} is unfinished: run the command that began it again, and it goes on")
    if storage.read(FETCHED) is not None:
        raise UserError(f"{storage} is unfinished: run the same `mlm-train tol fetch` again, and it goes on")
    raise UserError(f"{storage.at(INDEX)} does not exist; give what `mlm-train tol build` has written")


def parse_index(data: bytes, file: str) -> TolIndex:
    """What the file INDEX holds."""
    tree = parse_json(data, file, REBUILD)
    digest = tree.pop("digest", None)
    index = record_of(TolIndex, tree, file, REBUILD)
    if digest is not None and digest != _digest(data, str(digest)):
        raise UserError(f"{file} is damaged, or was changed by hand: its digest is another; {REBUILD}")
    return index


def write_index(storage: Storage, index: TolIndex) -> None:
    """Make a place a ToL: call it when every partition is there."""
    tree = index.model_dump(mode="json") | {"digest": _NO_DIGEST}
    data = (json.dumps(tree, indent=2) + "\n").encode()
    storage.write(INDEX, data.replace(_NO_DIGEST.encode(), _digest(data, _NO_DIGEST).encode()))


def _digest(index: bytes, digest: str) -> str:
    """SHA-256 of the index's bytes with zeros for the digest in them."""
    return hashlib.sha256(index.replace(digest.encode(), _NO_DIGEST.encode())).hexdigest()


_NO_DIGEST = "0" * 64
