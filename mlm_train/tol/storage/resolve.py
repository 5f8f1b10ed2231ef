"""What a path, a URL or an address within a build means."""

from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.tol.storage.base import Files, Place
from mlm_train.tol.storage.local import Folder
from mlm_train.tol.storage.node_folders import KEEPER
from mlm_train.tol.storage.urls import is_url


def place_of(where: str | Path | Place) -> Place:
    """The place that a path or a URL means; one that is given. UserError for a URL that cannot be used."""
    if not isinstance(where, str | Path):
        return where
    if where == "":  # as a path it would be the working folder
        raise UserError("the folder's name is empty; name a folder or a URL")
    if not is_url(where):
        return Folder(Path(where).absolute())
    from mlm_train.tol.storage.object_store import UrlPlace

    return UrlPlace(str(where))


def files_at(address: str) -> Files:
    """What a place's address means, in a process of its build."""
    if not address.startswith(KEEPER):
        return place_of(address)
    from mlm_train.tol.storage.node_folders import KeptFiles

    return KeptFiles(address)
