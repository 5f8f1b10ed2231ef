"""Addresses of stores, told from paths."""

import re
from pathlib import Path

from mlm_train.errors import UserError

LOCAL = ("file", "local")  # schemes of folders of this machine


def is_url(where: str | Path) -> bool:
    """Whether it is an address of a store, not a path."""
    return "://" in str(where)


def shown(url: str) -> str:
    """A URL without the password that it may hold."""
    return re.sub(r"://([^/@:]*):[^/@]*@", r"://\1@", url)


def refuse_url(where: str | Path) -> None:
    """UserError for a URL where rows are to be read: they are mapped into memory, from a folder."""
    if (url := _url_in(where)) is not None:
        raise UserError(f"{url} is a URL; copy the table first: mlm-train tol fetch {url} FOLDER")


def refuse_url_output(where: str | Path, why: str) -> None:
    """UserError for a URL, or no name at all, where a folder is to be written; `why` it must be one."""
    if (url := _url_in(where)) is not None:
        raise UserError(f"{url} is a URL; name a folder: {why}")
    if where == "":
        raise UserError(f"the folder's name is empty; name a folder: {why}")


def _url_in(where: str | Path) -> str | None:
    """The URL, to be shown; None for a path."""
    if is_url(where):
        return None if Path(where).exists() else shown(str(where))
    # A Path has one slash where its URL had two, or three: of a host, or of this machine's files.
    found = re.match(r"([A-Za-z][\w+.-]*):(/.*)", str(where)) if isinstance(where, Path) else None
    if found is None or Path(where).exists():
        return None
    return shown(f"{found[1]}:/{'/' if found[1] in LOCAL else ''}{found[2]}")
