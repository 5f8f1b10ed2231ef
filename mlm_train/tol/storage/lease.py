"""Who builds at a URL: one process at a time, by a file there that its owner keeps fresh.

Stores have no locks. The owner writes `tol.owner.json` again every REFRESH seconds and reads it before each
commit. Another process is refused while the file is fresh, and takes it over once nobody has renewed it; the
one before, should it live on, finds another's name there and ends.

What that does not close is the moment between an owner's look and its commit. It takes an owner that slept
for FRESH seconds and woke just then; what it commits is what the same plan gives its successor too.
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
from typing import NamedTuple

from pydantic import Field

from mlm_train.errors import UserError, escaped
from mlm_train.tol.storage.base import Storage
from mlm_train.utils.records import Record, json_value
from mlm_train.utils.run_lock import SlurmAttempt

OWNER = "tol.owner.json"
# Seconds for which a mark counts. All processes must agree, so it is for tests only to change.
FRESH = float(os.environ.get("MLM_TOL_FRESH_SECONDS") or 60)
REFRESH = FRESH / 4
SETTLE = FRESH / 30  # longer than a read and a write take: of two that begin together one sees the other


class Lost(UserError):
    """Another process has taken the place."""


class Owner(NamedTuple):
    """What the file says: whose it is, and when that was written, by the owner's clock."""

    id: str
    host: str
    pid: int
    job: str | None
    restart: int
    time: float

    @classmethod
    def here(cls) -> "Owner":
        """This process, by a new id."""
        job, restart = SlurmAttempt.here() or (None, 0)
        return cls(secrets.token_hex(8), socket.gethostname(), os.getpid(), job, restart, time.time())

    def follows(self, other: "Owner") -> bool:
        """Whether Slurm has started this one in the other's stead."""
        return self.job is not None and self.job == other.job and self.restart > other.restart

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class _Mark(Record):
    """What the file OWNER holds: an Owner."""

    id: str
    host: str
    pid: int
    job: str | None
    restart: int
    time: float = Field(allow_inf_nan=False)


class Lease:
    """Holds a URL for this process; see `leased`."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.mine = storage, Owner.here()

    def take(self, doing: str) -> None:
        """Become the owner; UserError where another one lives."""
        before = _read(self.storage)
        if before is not None and not self.mine.follows(before) and self._lives(before):
            raise UserError(
                f"{self.storage} is {doing} by {before}; wait for it, or {FRESH:.0f} s where it is gone, "
                "or name another"
            )
        if before is not None:
            line = f"{self.storage}: taken over from {before}, which is gone"
            print(f"mlm-train: {escaped(line)}", file=sys.stderr)
        self._write(self.storage)
        time.sleep(SETTLE)
        self.check()

    def _lives(self, owner: Owner) -> bool:
        if abs(time.time() - owner.time) < FRESH:
            return True
        # Clocks of machines differ: one that lives renews its mark, whatever time that says.
        time.sleep(1.5 * REFRESH)
        now = _read(self.storage)
        return now is not None and now != owner

    def check(self) -> None:
        """Raise Lost where this process is not the owner any more."""
        self._check(self.storage)

    def _check(self, storage: Storage) -> None:
        found = _read(storage)
        if found is None or found.id != self.mine.id:
            by = found or "another process, which has ended"
            raise Lost(f"{storage} was taken over by {by}; this process ends and writes nothing more")

    def _write(self, storage: Storage) -> None:
        tree = self.mine._replace(time=time.time())._asdict()
        storage.write(OWNER, (json.dumps(tree) + "\n").encode())

    def renew(self, open_place: Callable[[], Storage], ended: threading.Event) -> None:
        """Keep the mark fresh; end this process once it is another's, whatever the main thread does."""
        storage = None
        while not ended.wait(REFRESH):
            try:
                storage = storage or open_place()
                self._check(storage)
                self._write(storage)
            except Lost as error:
                with contextlib.suppress(OSError):
                    os.write(2, f"mlm-train: {escaped(str(error))}\n".encode())
                os._exit(2)
            except UserError:
                continue  # out of reach now: the next commit says so, or it is back by then

    def end(self) -> None:
        """Give the place back."""
        with contextlib.suppress(UserError):  # out of reach, or another's: the mark grows old by itself
            self.check()
            self.storage.remove(OWNER)


@contextlib.contextmanager
def leased(open_place: Callable[[], Storage], doing: str) -> Iterator[Lease]:
    """Hold a place while the block runs; `doing` says what another holder does.

    open_place: opens it anew, without a lease; the file systems of some stores serve one thread each.
    """
    lease = Lease(open_place())
    lease.take(doing)
    ended = threading.Event()
    thread = threading.Thread(target=lambda: lease.renew(open_place, ended), name="tol-lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        lease.end()


def _read(storage: Storage) -> Owner | None:
    """The owner; None where there is none, or none that can be made out."""
    data = storage.read(OWNER)
    try:
        return None if data is None else Owner(**_Mark.model_validate(json_value(data)).model_dump())
    except ValueError:
        return None
