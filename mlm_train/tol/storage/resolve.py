"""Opening the storage of a path, a URL, or an address within a build."""

from collections.abc import Callable
from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.tol.storage.base import Storage, StorageReader
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.storage.node_folders import SERVED, ServedFolder
from mlm_train.tol.storage.object_store import ObjectStorage
from mlm_train.utils.extensions import added, load
from mlm_train.utils.urls import is_url


def _folder(path: str) -> Storage:
    return LocalFolder(Path(path).absolute())


PATH = ""  # the scheme of what has none
# What makes a storage of an address, in any process, by its scheme. Other packages add theirs by entry points
# of GROUP, which name a class made as Class(url) (docs/extending.md); what nobody has is fsspec's.
STORAGES: dict[str, Callable[[str], Storage]] = {PATH: _folder}
GROUP = "mlm_train.storages"


def storage_at(where: str | Path | Storage) -> Storage:
    """Open the storage of a path or URL; return a Storage as it is. UserError for an unusable URL."""
    if not isinstance(where, str | Path):
        return where
    if where == "":  # as a path it would be the working directory
        raise UserError("the folder's name is empty; name a folder or a URL")
    scheme = str(where).partition("://")[0] if is_url(where) else PATH
    return (STORAGES.get(scheme) or _other(scheme))(str(where))


def _other(scheme: str) -> Callable[[str], Storage]:
    if (point := added(GROUP, STORAGES).get(scheme)) is not None:
        make: Callable[[str], Storage] = load(point)
        return make
    return ObjectStorage


def reader_at(address: str) -> StorageReader:
    """Open a storage by its address, in a process of its build."""
    if not address.startswith(SERVED):
        return storage_at(address)
    return ServedFolder(address)
