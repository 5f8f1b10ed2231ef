"""Count what this process reads: bytes by the kernel's own count, opened files by Python's audit events."""

import functools
import sys
from pathlib import Path
from typing import Any, Self

from mlm_train.errors import UserError

_COUNTS = Path("/proc/self/io")
_listening: list["FileTraffic"] = []  # an audit hook cannot be removed


class FileTraffic:
    """Counts within `with FileTraffic(folder) as traffic:`.

    `bytes_read`: by all threads, from any file, from the page cache too; what sockets receive does not count.
    `opens`: of files in the folder. Raises UserError where the kernel does not count.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes_read, self.opens = str(folder), 0, 0

    def __enter__(self) -> Self:
        _listen()
        self.bytes_read = -_read_so_far()
        _listening.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _listening.remove(self)
        self.bytes_read += _read_so_far()


@functools.cache
def _listen() -> None:
    sys.addaudithook(_heard)


def _heard(event: str, details: tuple[Any, ...]) -> None:
    if event == "open":
        for traffic in _listening:
            traffic.opens += str(details[0]).startswith(traffic.folder)


def _read_so_far() -> int:
    """Bytes that this process has read."""
    if not _COUNTS.is_file():
        raise UserError(f"{_COUNTS} is missing: reads are counted on Linux alone")
    counts = dict(line.split(": ") for line in _COUNTS.read_text(encoding="ascii").splitlines())
    return int(counts["rchar"])
