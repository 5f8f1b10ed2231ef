"""Refusing URLs where a table's folder is needed."""

from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.utils.urls import url_in


def refuse_url(where: str | Path) -> None:
    """Raise a UserError for the URL of a table to read rows from: they are memory-mapped, from a folder."""
    if (url := url_in(where)) is not None:
        raise UserError(f"{url} is a URL; copy the table first: mlm-train tol fetch {url} FOLDER")


def refuse_url_output(where: str | Path, why: str) -> None:
    """Raise a UserError, with the reason `why`, for a URL or an empty name where a folder is written."""
    if (url := url_in(where)) is not None:
        raise UserError(f"{url} is a URL; name a folder: {why}")
    if where == "":
        raise UserError(f"the folder's name is empty; name a folder: {why}")
