"""A lease on a URL: one process builds there at a time, and renews a lease file while it does.

Stores have no locks. The owner rewrites `tol.owner.json` every REFRESH seconds and reads it before each
commit. Another process is rejected while the lease is fresh and takes it over once it has expired; the
previous owner, if it is still alive, finds another owner in the file and exits.

One race stays open: an owner that slept for FRESH seconds and woke between its check and its commit. It
commits what the same plan gives its successor too.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pydantic import Field

from mlm_train.errors import UserError, escaped
from mlm_train.tol.storage.base import Storage
from mlm_train.utils.records import Record, json_value
from mlm_train.utils.run_lock import Attempt

OWNER = "tol.owner.json"
# Seconds until a lease expires. All processes must agree on it, so only tests may change it.
FRESH = float(os.environ.get("MLM_TOL_FRESH_SECONDS") or 60)
REFRESH = FRESH / 4
SETTLE = FRESH / 30  # longer than a read and a write take: of two that start together one sees the other


class LeaseLost(UserError):
    """Another process has taken over the lease."""


class Owner(Record):
    """The lease file: the process that owns it, and when it was renewed, by the owner's clock."""

    id: str
    host: str
    pid: int
    job: str | None
    restart: int
    time: float = Field(allow_inf_nan=False)

    @classmethod
    def here(cls) -> "Owner":
        """This process, with a new id."""
        attempt = Attempt.here()
        return cls(
            id=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            job=attempt.job if attempt else None,
            restart=attempt.restart if attempt else 0,
            time=time.time(),
        )

    def follows(self, other: "Owner") -> bool:
        """Whether it is a later Slurm restart of the other's job."""
        return self.job is not None and self.job == other.job and self.restart > other.restart

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """This process's lease on a URL; see `leased`."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.mine = storage, Owner.here()

    def take(self, doing: str) -> None:
        """Become the owner; UserError if another owner is alive. Waits SETTLE seconds."""
        previous = _read(self.storage)
        if previous is not None and not self.mine.follows(previous) and self._is_alive(previous):
            raise UserError(
                f"{self.storage} is {doing} by {previous}; wait for it (or {FRESH:.0f} s if it is gone), "
                "or name another folder"
            )
        if previous is not None:
            line = f"{self.storage}: taken over from {previous}, which is gone"
            print(f"mlm-train: {escaped(line)}", file=sys.stderr)
        self._write(self.storage)
        time.sleep(SETTLE)
        self.check()

    def _is_alive(self, owner: Owner) -> bool:
        if abs(time.time() - owner.time) < FRESH:
            return True
        # Clocks differ between machines: a live owner renews its lease, whatever its clock shows.
        time.sleep(1.5 * REFRESH)
        now = _read(self.storage)
        return now is not None and now != owner

    def check(self) -> None:
        """Raise LeaseLost if this process is no longer the owner."""
        self._check(self.storage)

    def _check(self, storage: Storage) -> None:
        owner = _read(storage)
        if owner is None or owner.id != self.mine.id:
            by = owner or "another process, which has ended"
            raise LeaseLost(f"{storage} was taken over by {by}; this process exits and writes nothing more")

    def _write(self, storage: Storage) -> None:
        tree = self.mine.model_dump() | {"time": time.time()}
        storage.write(OWNER, (json.dumps(tree) + "\n").encode())

    def renew(self, open_storage: Callable[[], Storage], ended: threading.Event) -> None:
        """Renew the lease until `ended`; exit this process, with code 2, once another has taken it over."""
        storage = None
        while not ended.wait(REFRESH):
            try:
                storage = storage or open_storage()
                self._check(storage)
                self._write(storage)
            except LeaseLost as error:
                with contextlib.suppress(OSError):
                    os.write(2, f"mlm-train: {escaped(str(error))}\n".encode())
                os._exit(2)
            except UserError:
                continue  # unreachable now: the next commit reports it, or it is back by then

    def release(self) -> None:
        """Remove the lease file."""
        with contextlib.suppress(UserError):  # unreachable, or another's: the lease expires by itself
            self.check()
            self.storage.remove(OWNER)


@contextlib.contextmanager
def leased(open_storage: Callable[[], Storage], doing: str) -> Iterator[Lease]:
    """Own the lease of a storage while the block runs, renewed by a background thread.

    open_storage: opens the storage anew, without a lease; the file systems of some stores serve one thread
    each. doing: what the owner does, for the UserError where another process owns the lease.
    """
    lease = Lease(open_storage())
    lease.take(doing)
    ended = threading.Event()
    thread = threading.Thread(target=lambda: lease.renew(open_storage, ended), name="tol-lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        lease.release()


def _read(storage: Storage) -> Owner | None:
    """The owner; None if there is no lease file, or an unreadable one."""
    data = storage.read(OWNER)
    try:
        return None if data is None else Owner.model_validate(json_value(data))
    except ValueError:
        return None
