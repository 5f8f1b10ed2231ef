"""A folder that all workers see under one path."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.tol.storage.base import Storage, draft_name
from mlm_train.tol.storage.direct_io import FileSink, Sink
from mlm_train.utils.files import listed, open_regular, replace_file, sha256_of, sync, writing
from mlm_train.utils.records import read_regular
from mlm_train.utils.run_lock import owned
from mlm_train.utils.url_folder import BLOCK_BYTES


class LocalFolder:
    """A folder that all workers see under one path."""

    in_order, remote = False, False

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)

    def __str__(self) -> str:
        return str(self.path)

    def at(self, name: str) -> str:
        """The path of a file."""
        return str(self.path / name)

    def read(self, name: str) -> bytes | None:
        """Read a file; None if it does not exist."""
        try:
            return read_regular(self.path / name, LARGEST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be read: {error.strerror}") from None

    def write(self, name: str, data: bytes) -> None:
        """Replace a small file atomically and durably."""
        replace_file(self.path / name, data)

    def blocks(self, name: str) -> Iterator[bytes]:
        """Stream a file from start to end; UserError for a link that leads out of the folder."""
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
        """The names of all files."""
        return [path.name for path in self.path.iterdir()]

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        (self.path / name).unlink(missing_ok=True)

    def free(self) -> int | None:
        """Free bytes of its file system."""
        return shutil.disk_usage(self.path).free

    def draft(self, name: str, size: int, header: bytes = b"") -> str:
        """Create a draft and return its name; a worker that outlives its builder cannot create one."""
        draft = draft_name(name)
        self._create(self.path / draft, size, header)
        return draft

    @staticmethod
    def _create(path: Path, size: int, header: bytes) -> None:
        """Create a file with its header and reserve its space; a full disk raises here.

        Only before anyone writes to it: where a file system cannot reserve space, the C library writes into
        every block, over what another process may be writing there.
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
        """Open a draft for writing past the page cache, after its header."""
        return FileSink(self.path / draft, len(header))

    def name_draft(self, draft: str, name: str, size: int) -> None:
        """Rename a complete draft, durably."""
        (self.path / draft).rename(self.path / name)
        sync(self.path)

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: workers see the folder itself."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Hold a file lock, which ends with the process."""
        with writing(self.path), owned(self.path, doing):
            yield


def sha256_at(storage: Storage, name: str) -> str:
    """The hexadecimal SHA-256 of a file, read from start to end."""
    if isinstance(storage, LocalFolder):
        return sha256_of(storage.path / name)
    digest = hashlib.sha256()
    for block in storage.blocks(name):
        digest.update(block)
    return digest.hexdigest()


LARGEST = 2**32  # bytes of a file that is read into memory: the bases of all layers are one file
