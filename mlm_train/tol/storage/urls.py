"""Telling URLs from paths."""

import re
from pathlib import Path

from mlm_train.errors import UserError

LOCAL = ("file", "local")  # URL schemes of this machine's folders


def is_url(where: str | Path) -> bool:
    """Whether it is a URL, not a path."""
    return "://" in str(where)


def redacted(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"://([^/@:]*):[^/@]*@", r"://\1@", url)


def refuse_url(where: str | Path) -> None:
    """Raise a UserError for the URL of a table to read rows from: they are memory-mapped, from a folder."""
    if (url := _url_in(where)) is not None:
        raise UserError(f"{url} is a URL; copy the table first: mlm-train tol fetch {url} FOLDER")


def refuse_url_output(where: str | Path, why: str) -> None:
    """Raise a UserError, with the reason `why`, for a URL or an empty name where a folder is written."""
    if (url := _url_in(where)) is not None:
        raise UserError(f"{url} is a URL; name a folder: {why}")
    if where == "":
        raise UserError(f"the folder's name is empty; name a folder: {why}")


def _url_in(where: str | Path) -> str | None:
    """The URL, without its password; None for a path."""
    if is_url(where):
        return None if Path(where).exists() else redacted(str(where))
    # Path() reduces the two or three slashes of a URL to one.
    match = re.match(r"([A-Za-z][\w+.-]*):(/.*)", str(where)) if isinstance(where, Path) else None
    if match is None or Path(where).exists():
        return None
    return redacted(f"{match[1]}:/{'/' if match[1] in LOCAL else ''}{match[2]}")
