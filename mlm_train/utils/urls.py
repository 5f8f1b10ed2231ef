"""Telling URLs from paths."""

import re
from pathlib import Path

LOCAL = ("file", "local")  # URL schemes of this machine's folders


def is_url(where: str | Path) -> bool:
    """Whether it is a URL, not a path."""
    return "://" in str(where)


def redacted(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"://([^/@:]*):[^/@]*@", r"://\1@", url)


def url_in(where: str | Path) -> str | None:
    """The URL that a user gave where a path is expected, without its password; None for a path."""
    if is_url(where):
        return None if Path(where).exists() else redacted(str(where))
    # Path() reduces the two or three slashes of a URL to one.
    match = re.match(r"([A-Za-z][\w+.-]*):(/.*)", str(where)) if isinstance(where, Path) else None
    if match is None or Path(where).exists():
        return None
    return redacted(f"{match[1]}:/{'/' if match[1] in LOCAL else ''}{match[2]}")
