"""A folder at a URL of any store that fsspec supports.

Object stores (ATOMIC_STORES) make a file visible when it is closed, complete or not at all, and rename by
copying: there a draft has the file's final name. In all other stores (file, sftp, ftp, ...) a draft has its
own name and is renamed.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from mlm_train.errors import UserError
from mlm_train.utils.files import draft_of, with_fix
from mlm_train.utils.threads import begun
from mlm_train.utils.urls import redacted

Result = TypeVar("Result")
PATIENCE = 60.0  # seconds for an answer
BLOCK_BYTES = 8 * 2**20  # of one read or write of a file that is streamed
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


def answered(url: str, work: Callable[[], Result]) -> Result:
    """The result of calls to a store; UserError where it has not answered for PATIENCE seconds.

    Libraries wait for minutes, or for ever. The abandoned call goes on in a thread and ends with the process.
    """
    call = begun(work)
    if not wait([call], PATIENCE).done:
        raise UserError(f"{url} has not answered for {PATIENCE:.0f} s: check the address and the network")
    return call.result()


def each_answered(url: str, work: Generator[None, None, None]) -> Iterator[None]:
    """The steps of a generator that calls a store, each `answered`."""
    try:
        while answered(url, lambda: next(work, work)) is None:
            yield
    finally:
        with contextlib.suppress(UserError, ValueError):  # ValueError: the last step has not returned
            answered(url, work.close)


def check_url(url: str) -> None:
    """Raise UserError for a URL that cannot be opened here, without opening it."""
    import fsspec

    shown = redacted(url)
    scheme, _, path = url.partition("://")
    if not path.strip("/"):
        raise UserError(f"{shown}: name a folder in it, such as {scheme}://.../run1")
    if "::" in url:
        raise UserError(f"{shown}: give one address, not a chain of them (::)")
    if scheme not in fsspec.available_protocols():
        known = "give s3://, gs://, sftp://, file:// or another that fsspec supports"
        raise UserError(f"{shown}: there is no {scheme}://; {known}")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or scheme
        raise UserError(f"{shown}: needs the package {package}: pip install {package}") from None


class UrlFolder:
    """A folder at a URL; each process and thread opens it for itself, with its own machine's credentials.

    Methods raise UserError.
    """

    def __init__(self, url: str) -> None:
        scheme, _, path = url.partition("://")
        self.address = f"{scheme}://{path.rstrip('/')}"
        self._shown = redacted(self.address)
        self._atomic = scheme in ATOMIC_STORES
        check_url(self.address)
        self._fs, self._root = self._opened()

    def _opened(self) -> tuple[Any, str]:
        """The fsspec file system, and the path in it."""
        import fsspec

        with store_errors(self._shown):
            system, root = fsspec.core.url_to_fs(self.address)
        return system, root.rstrip("/")

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

    def _check_owned(self) -> None:
        """Called before each change, for a subclass that shares the folder."""

    def create(self) -> None:
        """Create the folder, where a store has folders."""
        if not self._atomic:
            with store_errors(self._shown):
                self._fs.makedirs(self._root, exist_ok=True)

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        with store_errors(self.at(name)):
            try:
                return bytes(self._fresh.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file atomically: as one object, or by a rename."""
        self._check_owned()
        with store_errors(self.at(name)):
            draft = self._draft_of(name)
            self._fs.pipe_file(self._path(draft), data)
            self._rename(draft, name)

    def write_blocks(self, name: str, size: int, blocks: Iterator[np.ndarray]) -> Generator[None, None, None]:
        """Write a file of `size` bytes from its blocks (uint8), as `write` does; yields after each.

        Closed or failed before its end, it leaves at most a draft.
        """
        draft = self._draft_of(name)
        sink = self.sink(draft)
        try:
            for block in blocks:
                sink.append(block)
                yield
            sink.finish()
        finally:
            sink.close()
        self.name_draft(draft, name, size)

    def _draft_of(self, name: str) -> str:
        return name if self._atomic else draft_of(Path(name)).name

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
        """The names of all files, and of the folders in it."""
        with store_errors(self._shown):
            try:
                paths = self._fresh.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        return sorted({path.rstrip("/").removeprefix(f"{self._root}/") for path in paths} - {self._root})

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self._check_owned()
        if self.size(name) is None:
            return  # stores do not always raise FileNotFoundError for a missing file
        with store_errors(self.at(name)), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_all(self) -> None:
        """Remove the folder with all files in it."""
        with store_errors(self._shown), contextlib.suppress(FileNotFoundError):
            self._fresh.rm(self._root, recursive=True)

    def sink(self, draft: str, header: bytes = b"") -> "UrlSink":
        """Create a draft and write its header; the next bytes follow it."""
        with store_errors(self.at(draft)):
            return UrlSink(self._open(draft, "wb"), self.at(draft), header)

    def name_draft(self, draft: str, name: str, size: int) -> None:
        """Rename a complete draft unless it has its name. UserError if its writer wrote it elsewhere."""
        self._check_owned()
        if self.size(draft) != size:
            raise UserError(
                f"{self.at(draft)}: a worker wrote {size} bytes that are not visible here: "
                "give a URL that means the same storage on all nodes"
            )
        with store_errors(self.at(name)):
            self._rename(draft, name)


class UrlSink:
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
