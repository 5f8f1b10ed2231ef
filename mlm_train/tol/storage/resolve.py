"""Opening the storage of a path, a URL, or an address within a build."""

from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.tol.storage.base import Storage, StorageReader
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.storage.node_folders import SERVED
from mlm_train.tol.storage.urls import is_url


def storage_at(where: str | Path | Storage) -> Storage:
    """Open the storage of a path or URL; return a Storage as it is. UserError for an unusable URL."""
    if not isinstance(where, str | Path):
        return where
    if where == "":  # as a path it would be the working directory
        raise UserError("the folder's name is empty; name a folder or a URL")
    if not is_url(where):
        return LocalFolder(Path(where).absolute())
    from mlm_train.tol.storage.object_store import ObjectStorage

    return ObjectStorage(str(where))


def reader_at(address: str) -> StorageReader:
    """Open a storage by its address, in a process of its build."""
    if not address.startswith(SERVED):
        return storage_at(address)
    from mlm_train.tol.storage.node_folders import ServedFolder

    return ServedFolder(address)
