"""A table at a URL.

In object stores two attempts at a partition write the same bytes one after the other; in all other stores
each draft has its own name. In both, a file counts only once the state or the index names it, and those are
written after it.

An abandoned worker that wakes late can overwrite a committed object with the bytes of its own plan. They are
the same bytes unless its machine rounds differently; `tol verify` and `tol fetch` detect that by checksum.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.tol.storage.base import draft_name
from mlm_train.tol.storage.lease import OWNER, Lease, leased
from mlm_train.utils.files import with_fix
from mlm_train.utils.run_lock import owned
from mlm_train.utils.url_folder import UrlFolder
from mlm_train.utils.urls import LOCAL


class ObjectStorage(UrlFolder):
    """A folder at a URL, which one process builds in."""

    in_order, remote = True, True
    _lease: Lease | None = None

    def names(self) -> list[str]:
        """The names of all files except the lease file."""
        return [name for name in super().names() if name != OWNER]

    def free(self) -> int | None:
        """None: unknown."""
        return None

    def draft(self, name: str, size: int, header: bytes = b"") -> str:
        """The name of a draft: the file's own in an atomic store, else a new one. The worker creates it."""
        return name if self._atomic else draft_name(name)

    def _check_owned(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def served(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: workers open the URL themselves."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def locked(self, doing: str) -> Iterator[None]:
        """Hold a lease (lease.py); for a folder of this machine its file lock too."""
        self.create()
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
