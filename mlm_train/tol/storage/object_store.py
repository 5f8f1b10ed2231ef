"""A table at a URL, of any store that fsspec knows.

Stores of objects (WHOLE) show a file when it is closed, all of it or nothing, and rename by copying: there a
draft has the file's own name, and two attempts at a partition put the same bytes there, one after the other.
Everywhere else (file, sftp, ftp, ...) a draft has a name of its own, and is renamed. Either way a file counts
only because the state or the index names it, and those are written after it.

A worker that was given up and wakes late can put the bytes of its own plan under the name of an object that
counts: the same ones, unless its machine computes otherwise. `tol verify` and `tol fetch` find that by the
checksum.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlm_train.errors import UserError
from mlm_train.tol.storage.base import BLOCK_BYTES, draft_name, writing_name
from mlm_train.tol.storage.direct_io import Sink
from mlm_train.tol.storage.lease import OWNER, Lease, leased
from mlm_train.tol.storage.urls import LOCAL, shown
from mlm_train.utils.files import with_fix
from mlm_train.utils.run_lock import owned

# Stores whose files appear when they are closed, whole, and where a rename copies.
WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "hf"}


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn what a store's library raises, of whatever type, into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        advice = "check the address, the network and your rights there"
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{url}: {with_fix(error, advice)}") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{url}: {lines[0]}; {advice}") from error


def _opened(url: str, shown: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec

    scheme, _, path = url.partition("://")
    if not path.strip("/"):
        raise UserError(f"{shown}: name a folder in it, such as {scheme}://.../tol")
    if "::" in url:
        raise UserError(f"{shown}: give one address, not a chain of them (::)")
    if scheme not in fsspec.available_protocols():
        known = "give s3://, gs://, sftp://, file:// or another that fsspec knows"
        raise UserError(f"{shown}: there is no {scheme}://; {known}")
    with reaching(shown):
        try:
            return fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or scheme
            raise UserError(f"{shown}: needs the package {package}: pip install {package}") from None


class ObjectStorage:
    """A URL; each process and each thread opens its own, by its own machine's credentials."""

    in_order, far = True, True

    def __init__(self, url: str) -> None:
        scheme, _, path = url.partition("://")
        self.address = f"{scheme}://{path.rstrip('/')}"
        self._shown = shown(self.address)
        self._whole = scheme in WHOLE
        self._lease: Lease | None = None
        self._fs, root = _opened(self.address, self._shown)
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self._shown

    def at(self, name: str) -> str:
        """Its URL."""
        return f"{self._shown}/{name}"

    @property
    def _fresh(self) -> Any:
        """The file system, without the listings that it has kept: other processes write there too."""
        self._fs.invalidate_cache()
        return self._fs

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""
        with reaching(self.at(name)):
            try:
                return bytes(self._fresh.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """One object, or a file that is renamed."""
        self._check()
        with reaching(self.at(name)):
            draft = name if self._whole else writing_name(name)
            self._fs.pipe_file(self._path(draft), data)
            self._rename(draft, name)

    def _rename(self, draft: str, name: str) -> None:
        if draft != name:
            self._fs.mv(self._path(draft), self._path(name))

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file from start to end."""
        with reaching(self.at(name)), self._open(name, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def _open(self, name: str, mode: str) -> BinaryIO:
        return self._fresh.open(self._path(name), mode)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is not there."""
        with reaching(self.at(name)):
            try:
                return int(self._fresh.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def names(self) -> list[str]:
        """All that lies there, but for the mark of who holds it."""
        with reaching(self._shown):
            try:
                paths = self._fresh.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = {path.rstrip("/").removeprefix(f"{self._root}/") for path in paths} - {self._root, OWNER}
        return sorted(names)

    def remove(self, name: str) -> None:
        """Remove a file that may be gone already."""
        self._check()
        if self.size(name) is None:
            return  # what a store says of a file that is not there is not always FileNotFoundError
        with reaching(self.at(name)), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def free(self) -> int | None:
        """Not known."""
        return None

    def draft(self, name: str, size: int, header: bytes = b"") -> str:
        """The file's own name where it appears whole, else a new one; the worker writes the header too."""
        return name if self._whole else draft_name(name)

    def sink(self, draft: str, header: bytes = b"") -> Sink:
        """In order, while the next bytes are made."""
        with reaching(self.at(draft)):
            return ObjectSink(self._open(draft, "wb"), self.at(draft), header)

    def name_draft(self, draft: str, name: str, size: int) -> None:
        """Nothing to do where it has its name already. UserError where another node wrote it elsewhere."""
        self._check()
        if self.size(draft) != size:
            raise UserError(
                f"{self.at(draft)}: a worker wrote {size} bytes, which are not seen from here: "
                "give a URL that means one place on all nodes"
            )
        with reaching(self.at(name)):
            self._rename(draft, name)

    def _check(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def served(self) -> contextlib.AbstractContextManager[None]:
        """They open it themselves."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def held(self, doing: str) -> Iterator[None]:
        """By a mark that this process renews (lease.py), and where it is a folder here by its lock too."""
        if not self._whole:
            with reaching(self._shown):
                self._fs.makedirs(self._root, exist_ok=True)
        here = self.address.partition("://")[0] in LOCAL  # others may be given the folder by its path
        lock = owned(Path(self._root), doing) if here else contextlib.nullcontext()
        lease = leased(lambda: ObjectStorage(self.address), doing)
        with reaching_files(self._shown), lock, lease as self._lease:
            try:
                yield
            finally:
                self._lease = None


@contextlib.contextmanager
def reaching_files(url: str) -> Iterator[None]:
    """Turn an OSError of a worker, about whatever file, into a UserError."""
    try:
        yield
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{url}: {file}{with_fix(error, 'mend that and run again')}") from error


class ObjectSink:
    """A file at a URL, in order; one that is not finished is thrown away where the store can do that."""

    def __init__(self, file: BinaryIO, shown: str, header: bytes) -> None:
        self._file, self._shown, self._finished = file, shown, False
        with reaching(shown):
            self._file.write(header)

    def append(self, data: np.ndarray) -> None:
        """The next bytes."""
        with reaching(self._shown):
            for start in range(0, len(data), BLOCK_BYTES):  # the library keeps a copy of what it is given
                self._file.write(data[start : start + BLOCK_BYTES].data)

    def finish(self) -> None:
        """Have the store keep all of them; a store of objects shows the file from here on."""
        with reaching(self._shown):
            self._file.close()
        self._finished = True

    def close(self) -> None:
        """Let go of it: closing one that is not whole would commit what there is."""
        from fsspec.spec import AbstractBufferedFile

        if self._finished:
            return
        with contextlib.suppress(Exception):  # the error that led here is the one to tell
            if isinstance(self._file, AbstractBufferedFile):
                self._file.discard()
                self._file.closed = True
            else:
                self._file.close()
