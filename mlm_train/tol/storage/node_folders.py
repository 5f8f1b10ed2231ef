"""A folder of each node's own: a table is built into the builder's, over Ray, then copied to all other nodes.

Workers elsewhere do not see the builder's folder. What they write goes to an actor on the builder's node, its
keeper, a block at a time; the other nodes copy the finished table from it (tools/copy_to_nodes.py), every
file checked.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlm_train.errors import UserError
from mlm_train.tol.storage.base import BLOCK_BYTES
from mlm_train.tol.storage.direct_io import FileSink, Sink
from mlm_train.tol.storage.local import LocalFolder


class NodeFolder(LocalFolder):
    """The builder's folder, which only its node sees; names of environment variables in it are replaced."""

    in_order = True

    def __init__(self, path: str | Path) -> None:
        self.asked = str(path)
        super().__init__(expanded(self.asked))
        self._server = f"tol-{secrets.token_hex(8)}"
        self.address = SERVED + self._server

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """By a keeper on this node, while Ray runs."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        server = ray.remote(num_cpus=0, max_concurrency=16)(FolderServer)
        actor = server.options(name=self._server, scheduling_strategy=_on(here)).remote(str(self.path))
        ray.get(actor.ready.remote())
        try:
            yield
        finally:
            ray.kill(actor)


def expanded(path: str) -> Path:
    """A path on this node, absolute; UserError for a variable that is not set here."""
    found = os.path.expandvars(path)
    if "$" in found:
        raise UserError(f"{path}: a variable in it is not set on this node ({os.uname().nodename})")
    return Path(found).absolute()


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


class FolderServer:
    """A Ray actor: the files of a folder, for processes of other nodes."""

    def __init__(self, path: str) -> None:
        self._folder = LocalFolder(Path(path))

    def ready(self) -> None:
        """Returns once it runs."""

    def read(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""
        return self._folder.read(name)

    def block(self, name: str, start: int) -> bytes:
        """At most BLOCK_BYTES of a file, from `start` on; nothing at its end."""
        with open(self._folder.path / name, "rb", buffering=0) as file:
            return os.pread(file.fileno(), BLOCK_BYTES, start)

    def put(self, draft: str, start: int, data: np.ndarray) -> None:
        """Bytes of a draft that the builder has made."""
        with contextlib.closing(FileSink(self._folder.path / draft, start)) as sink:
            sink.append(data)

    def sync(self, draft: str) -> None:
        """Have all of a draft survive a power cut."""
        with contextlib.closing(self._folder.sink(draft)) as sink:
            sink.finish()


class ServedFolder:
    """The builder's folder as processes of its build see it, from any node."""

    def __init__(self, address: str) -> None:
        import ray

        self.address = address
        self._server = ray.get_actor(address.removeprefix(SERVED))

    def __str__(self) -> str:
        return "the builder's folder"

    def at(self, name: str) -> str:
        """For messages."""
        return f"{name} in {self}"

    def ask(self, method: str, *args: object) -> Any:
        """What the keeper answers. Raises what it raised, and UserError where it is gone."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(getattr(self._server, method).remote(*args))
        except RayActorError:
            raise UserError(f"{self} is out of reach: its node or the build is gone; run again") from None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, OSError | UserError) else error from None

    def read(self, name: str) -> bytes | None:
        """A small file; None where it is not there."""
        data: bytes | None = self.ask("read", name)
        return data

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file from start to end."""
        start = 0
        while block := self.ask("block", name, start):
            yield block
            start += len(block)

    def sink(self, draft: str, header: bytes = b"") -> Sink:
        """A block at a time."""
        return ServedSink(self, draft, len(header))


class ServedSink:
    """A draft in the builder's folder, filled in order."""

    def __init__(self, storage: ServedFolder, draft: str, start: int) -> None:
        self._storage, self._draft, self._at = storage, draft, start

    def append(self, data: np.ndarray) -> None:
        """The next bytes; one block is under way at a time, so that Ray's store stays small."""
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            self._storage.ask("put", self._draft, self._at, block)
            self._at += len(block)

    def finish(self) -> None:
        """Have all of them survive a power cut."""
        self._storage.ask("sync", self._draft)

    def close(self) -> None:
        """Nothing is held."""


SERVED = "keeper:"  # of addresses that only processes of one build understand
