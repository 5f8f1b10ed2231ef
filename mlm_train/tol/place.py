"""Where a table goes: a folder, or a URL of any store that fsspec knows. Plain names of files in either.

A file comes into being as a draft, which workers fill, and the builder alone gives it its name. In a folder a
draft is a hidden file, made by the builder, filled by one worker or several, and renamed once it is whole and
flushed. At a URL (url_place.py) it is written from its first byte to its last, by one worker.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

import numpy as np

from mlm_train.errors import UserError
from mlm_train.extensions import added, load
from mlm_train.files import draft_of, listed, open_regular, replace_file, sha256_of, sync, writing
from mlm_train.ownership import owned
from mlm_train.records import read_regular
from mlm_train.sizes import in_units
from mlm_train.tol.disk import FileSink, Sink

DRAFTS = ".*.part"  # glob of files that do not have their name yet
KEEPER = "keeper:"  # of addresses that only processes of one build understand
LOCAL = ("file", "local")  # schemes of folders of this machine
LARGEST = 2**32  # bytes of a file that is read whole: the bases of all layers are one
BLOCK_BYTES = 8 * 2**20  # of one read, or one write, of a file that is read or written in order


class Files(Protocol):
    """Files by their plain names, as any process sees them. Methods raise UserError or OSError.

    address: what `files_at` makes the same of, in any process.
    """

    address: str

    def at(self, name: str) -> str:
        """Where a file is, for messages."""

    def read(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file from start to end, BLOCK_BYTES at most at a time."""

    def sink(self, draft: str, header: bytes = b"") -> Sink:
        """Fill a draft, from behind `header` on, with which it was begun."""


class Place(Files, Protocol):
    """And what the one process does that holds the place. `held` turns an OSError into a UserError.

    in_order: a file is written from its first byte to its last, by one worker. far: reading one back takes as
    long as it took to write.
    """

    in_order: bool
    far: bool

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is not there."""

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file at once: readers see the old one or the new one, whole."""

    def names(self) -> list[str]:
        """All that lies there."""

    def remove(self, name: str) -> None:
        """Remove a file that may be gone already."""

    def free(self) -> int | None:
        """Bytes of space; None where that is not known."""

    def draft(self, name: str, size: int, header: bytes = b"") -> str:
        """Begin a file of that size, or of an unknown one (0); what its draft is called."""

    def name_draft(self, draft: str, name: str, size: int) -> None:
        """Give a whole draft, of `size` bytes, its name."""

    def held(self, doing: str) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from changing the place; UserError where one does (`doing`, of that one)."""

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Let workers have it, once Ray runs."""


def place_of(where: str | Path | Place) -> Place:
    """The place that a path or a URL means; one that is given. UserError for a URL that cannot be used."""
    if not isinstance(where, str | Path):
        return where
    if where == "":  # as a path it would be the working folder
        raise UserError("the folder's name is empty; name a folder or a URL")
    scheme = str(where).partition("://")[0] if is_url(where) else PATH
    return (STORAGES.get(scheme) or _other_storage(scheme))(str(where))


def _folder(path: str) -> Place:
    return Folder(Path(path).absolute())


PATH = ""  # the scheme of what has none
# What makes a place of an address, in any process, by its scheme. Other packages add theirs by entry points
# of GROUP, which name a class made as Class(url) (docs/extending.md); what nobody has is fsspec's.
STORAGES: dict[str, Callable[[str], Place]] = {PATH: _folder}
GROUP = "mlm_train.storages"


def _other_storage(scheme: str) -> Callable[[str], Place]:
    if (point := added(GROUP, STORAGES).get(scheme)) is not None:
        make: Callable[[str], Place] = load(point)
        return make
    from mlm_train.tol.url_place import UrlPlace

    return UrlPlace


def files_at(address: str) -> Files:
    """What a place's address means, in a process of its build."""
    if not address.startswith(KEEPER):
        return place_of(address)
    from mlm_train.tol.node_place import KeptFiles

    return KeptFiles(address)


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


def sha256_at(place: Place, name: str) -> str:
    """Hexadecimal SHA-256 of a file, read from start to end."""
    if isinstance(place, Folder):
        return sha256_of(place.path / name)
    digest = hashlib.sha256()
    for block in place.blocks(name):
        digest.update(block)
    return digest.hexdigest()


def put(sink: Sink, data: bytes) -> None:
    """Fill a draft with all of its bytes at once."""
    try:
        sink.append(np.frombuffer(data, np.uint8))
        sink.finish()
    finally:
        sink.close()


def remove_matching(place: Place, pattern: str) -> None:
    """Remove the files of such names (a glob)."""
    for name in place.names():
        if fnmatch(name, pattern):
            place.remove(name)


def remove_drafts(place: Place) -> None:
    """Remove what killed processes left half written."""
    remove_matching(place, DRAFTS)


def refuse_used(place: Place, note: str) -> None:
    """UserError where something lies there: nothing is overwritten.

    note: the file that is written there first; a process that was killed meanwhile left nothing else.
    """
    place.remove(writing_name(note))
    if place.names():
        raise UserError(f"{place} exists already and nothing is overwritten; name a new folder, or remove it")


def check_space(place: Place, needed: int) -> None:
    """UserError where a place is known to have fewer bytes free."""
    free = place.free()
    if free is not None and free < needed:
        raise UserError(
            f"{place} needs {in_units(needed)} and has {in_units(free)} free; "
            "free space or choose another folder"
        )


def writing_name(name: str) -> str:
    """What a small file is called before it takes its name."""
    return draft_of(Path(name)).name


def draft_name(name: str) -> str:
    """What a draft of a file is called: an attempt has its own, so that two cannot mix."""
    return f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part"


class Folder:
    """A folder that all workers see under one path."""

    in_order, far = False, False

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)

    def __str__(self) -> str:
        return str(self.path)

    def at(self, name: str) -> str:
        """Its path."""
        return str(self.path / name)

    def read(self, name: str) -> bytes | None:
        """A file; None where it is not there."""
        try:
            return read_regular(self.path / name, LARGEST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be read: {error.strerror}") from None

    def write(self, name: str, data: bytes) -> None:
        """Flushed, and renamed."""
        replace_file(self.path / name, data)

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file from start to end; UserError for a link that leads out of the folder."""
        path = listed(self.path, name, "the index")
        try:
            with open_regular(path) as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def size(self, name: str) -> int | None:
        """Bytes of a file; UserError for a link that leads out of the folder."""
        path = listed(self.path, name, "the index")
        return path.stat().st_size if path.is_file() else None

    def names(self) -> list[str]:
        """All that lies there."""
        return [path.name for path in self.path.iterdir()]

    def remove(self, name: str) -> None:
        """Remove a file that may be gone already."""
        (self.path / name).unlink(missing_ok=True)

    def free(self) -> int | None:
        """Of its file system."""
        return shutil.disk_usage(self.path).free

    def draft(self, name: str, size: int, header: bytes = b"") -> str:
        """Made here, so that a worker that outlives its builder leaves nothing in the folder."""
        draft = draft_name(name)
        self._make(self.path / draft, size, header)
        return draft

    @staticmethod
    def _make(path: Path, size: int, header: bytes) -> None:
        """Header and space; a full disk says so here.

        Once, before anybody fills it: where a file system cannot reserve space the C library writes into
        every block, over what another process may be putting there.
        """
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if size:
                os.posix_fallocate(file, 0, size)
            os.pwrite(file, header, 0)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(file)

    def sink(self, draft: str, header: bytes = b"") -> Sink:
        """Past the page cache."""
        return FileSink(self.path / draft, len(header))

    def name_draft(self, draft: str, name: str, size: int) -> None:
        """By a rename."""
        (self.path / draft).rename(self.path / name)
        sync(self.path)

    def served(self) -> contextlib.AbstractContextManager[None]:
        """They see it."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def held(self, doing: str) -> Iterator[None]:
        """By a lock that goes with the process."""
        with writing(self.path), owned(self.path, doing):
            yield
