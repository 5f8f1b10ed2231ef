"""A table at a URL of any store that fsspec supports.

Object stores (ATOMIC_STORES) make a file visible when it is closed, complete or not at all, and rename by
copying: there a draft has the file's final name, and two attempts at a partition write the same bytes one
after the other. In all other stores (file, sftp, ftp, ...) a draft has its own name and is renamed. In both,
a file counts only once the state or the index names it, and those are written after it.

An abandoned worker that wakes late can overwrite a committed object with the bytes of its own plan. They are
the same bytes unless its machine rounds differently; `tol verify` and `tol fetch` detect that by checksum.
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
from mlm_train.tol.storage.urls import LOCAL, redacted
from mlm_train.utils.files import with_fix
from mlm_train.utils.run_lock import owned

# Stores where a file becomes visible, complete, when it is closed, and where a rename copies.
ATOMIC_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "hf"}


@contextlib.contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn any exception of a store's library into a UserError of one line."""
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
    """The fsspec file system of a URL, and the path in it; `shown`: the URL for messages."""
    import fsspec

    scheme, _, path = url.partition("://")
    if not path.strip("/"):
        raise UserError(f"{shown}: name a folder in it, such as {scheme}://.../tol")
    if "::" in url:
        raise UserError(f"{shown}: give one address, not a chain of them (::)")
    if scheme not in fsspec.available_protocols():
        known = "give s3://, gs://, sftp://, file:// or another that fsspec supports"
        raise UserError(f"{shown}: there is no {scheme}://; {known}")
    with store_errors(shown):
        try:
            return fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or scheme
            raise UserError(f"{shown}: needs the package {package}: pip install {package}") from None


class ObjectStorage:
    """A folder at a URL; each process and thread opens it for itself, with its own machine's credentials."""

    in_order, remote = True, True

    def __init__(self, url: str) -> None:
        scheme, _, path = url.partition("://")
        self.address = f"{scheme}://{path.rstrip('/')}"
        self._shown = redacted(self.address)
        self._atomic = scheme in ATOMIC_STORES
        self._lease: Lease | None = None
        self._fs, root = _opened(self.address, self._shown)
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self._shown

    def at(self, name: str) -> str:
        """The URL of a file."""
        return f"{self._shown}/{name}"

    @property
    def _fresh(self) -> Any:
        """The file system with an empty listings cache: other processes write there too."""
        self._fs.invalidate_cache()
        return self._fs

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        with store_errors(self.at(name)):
            try:
                return bytes(self._fresh.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file atomically: as one object, or by a rename."""
        self._check_lease()
        with store_errors(self.at(name)):
            draft = name if self._atomic else writing_name(name)
            self._fs.pipe_file(self._path(draft), data)
            self._rename(draft, name)

    def _rename(self, draft: str, name: str) -> None:
        if draft != name:
            self._fs.mv(self._path(draft), self._path(name))

    def blocks(self, name: str) -> Iterator[bytes]:
        """Stream a file from start to end."""
        with store_errors(self.at(name)), self._open(name, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def _open(self, name: str, mode: str) -> BinaryIO:
        return self._fresh.open(self._path(name), mode)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it does not exist."""
        with store_errors(self.at(name)):
            try:
                return int(self._fresh.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def names(self) -> list[str]:
        """The names of all files except the lease file."""
        with store_errors(self._shown):
            try:
                paths = self._fresh.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = {path.rstrip("/").removeprefix(f"{self._root}/") for path in paths} - {self._root, OWNER}
        return sorted(names)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self._check_lease()
        if self.size(name) is None:
            return  # stores do not always raise FileNotFoundError for a missing file
        with store_errors(self.at(name)), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def free(self) -> int | None:
        """None: unknown."""
        return None

    def draft(self, name: str, size: int, header: bytes = b"") -> str:
        """The name of a draft: the file's own in an atomic store, else a new one. The worker creates it."""
        return name if self._atomic else draft_name(name)

    def sink(self, draft: str, header: bytes = b"") -> Sink:
        """Create a draft and write its header; the next bytes follow it."""
        with store_errors(self.at(draft)):
            return ObjectSink(self._open(draft, "wb"), self.at(draft), header)

    def name_draft(self, draft: str, name: str, size: int) -> None:
        """Rename a complete draft unless it has its name. UserError if its worker wrote it elsewhere."""
        self._check_lease()
        if self.size(draft) != size:
            raise UserError(
                f"{self.at(draft)}: a worker wrote {size} bytes that are not visible here: "
                "give a URL that means the same storage on all nodes"
            )
        with store_errors(self.at(name)):
            self._rename(draft, name)

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: workers open the URL themselves."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Hold a lease (lease.py); for a folder of this machine its file lock too."""
        if not self._atomic:
            with store_errors(self._shown):
                self._fs.makedirs(self._root, exist_ok=True)
        is_local = self.address.partition("://")[0] in LOCAL  # others may be given the folder by its path
        lock = owned(Path(self._root), doing) if is_local else contextlib.nullcontext()
        lease = leased(lambda: ObjectStorage(self.address), doing)
        with file_errors(self._shown), lock, lease as self._lease:
            try:
                yield
            finally:
                self._lease = None


@contextlib.contextmanager
def file_errors(url: str) -> Iterator[None]:
    """Turn an OSError of the builder or a worker, about any file, into a UserError."""
    try:
        yield
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{url}: {file}{with_fix(error, 'fix that and run again')}") from error


class ObjectSink:
    """A file at a URL, written sequentially; an unfinished one is discarded where the store supports that."""

    def __init__(self, file: BinaryIO, shown: str, header: bytes) -> None:
        self._file, self._shown, self._finished = file, shown, False
        with store_errors(shown):
            self._file.write(header)

    def append(self, data: np.ndarray) -> None:
        """Write the next bytes (uint8)."""
        with store_errors(self._shown):
            for start in range(0, len(data), BLOCK_BYTES):  # the library copies what it is given
                self._file.write(data[start : start + BLOCK_BYTES].data)

    def finish(self) -> None:
        """Close the file; in an object store it becomes visible now."""
        with store_errors(self._shown):
            self._file.close()
        self._finished = True

    def close(self) -> None:
        """Discard the file unless it is finished: closing it would commit an incomplete one."""
        from fsspec.spec import AbstractBufferedFile

        if self._finished:
            return
        with contextlib.suppress(Exception):  # the error that led here is the one to report
            if isinstance(self._file, AbstractBufferedFile):
                self._file.discard()
                self._file.closed = True
            else:
                self._file.close()
