"""Node-local folders: a table is built in the builder's folder, then copied to all other nodes over Ray.

Workers on other nodes do not see the builder's folder. They send what they write to an actor on the builder's
node, the folder server, a block at a time; the other nodes copy the finished table from it
(tools/copy_to_nodes.py) and check every file.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlm_train.errors import UserError
from mlm_train.tol.storage.direct_io import FileSink, Sink
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.utils.url_folder import BLOCK_BYTES


class NodeFolder(LocalFolder):
    """The builder's folder, which only its node sees; environment variables in its path are expanded."""

    in_order = True

    def __init__(self, path: str | Path) -> None:
        self.asked = str(path)
        super().__init__(expanded(self.asked))
        self._server = f"tol-{secrets.token_hex(8)}"
        self.address = SERVED + self._server

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Run a folder server on this node while the block runs; Ray must run."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        server = ray.remote(num_cpus=0, max_concurrency=16)(FolderServer)
        actor = server.options(name=self._server, scheduling_strategy=on_node(here)).remote(str(self.path))
        ray.get(actor.ready.remote())
        try:
            yield
        finally:
            ray.kill(actor)


def expanded(path: str) -> Path:
    """An absolute path with this node's environment variables expanded; UserError for one that is not set."""
    expanded_path = os.path.expandvars(path)
    if "$" in expanded_path:
        raise UserError(f"{path}: a variable in it is not set on this node ({os.uname().nodename})")
    return Path(expanded_path).absolute()


def on_node(node: str) -> Any:
    """The Ray scheduling strategy that pins a task or actor to a node id."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


class FolderServer:
    """A Ray actor that reads and writes the files of a folder for processes on other nodes."""

    def __init__(self, path: str) -> None:
        self._folder = LocalFolder(Path(path))

    def ready(self) -> None:
        """Return once the actor runs."""

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        return self._folder.read(name)

    def block(self, name: str, start: int) -> bytes:
        """Read at most BLOCK_BYTES of a file from offset `start`; nothing at its end."""
        with open(self._folder.path / name, "rb", buffering=0) as file:
            return os.pread(file.fileno(), BLOCK_BYTES, start)

    def put(self, draft: str, start: int, data: np.ndarray) -> None:
        """Write bytes of an existing draft at offset `start`."""
        with contextlib.closing(FileSink(self._folder.path / draft, start)) as sink:
            sink.append(data)

    def sync(self, draft: str) -> None:
        """Flush a draft to disk."""
        with contextlib.closing(self._folder.sink(draft)) as sink:
            sink.finish()


class ServedFolder:
    """The builder's folder, accessed through its folder server from any node."""

    def __init__(self, address: str) -> None:
        import ray

        self.address = address
        self._server = ray.get_actor(address.removeprefix(SERVED))

    def __str__(self) -> str:
        return "the builder's folder"

    def at(self, name: str) -> str:
        """The name of a file, for messages."""
        return f"{name} in {self}"

    def ask(self, method: str, *args: object) -> Any:
        """Call the folder server. Raises its OSError or UserError, and UserError if it is gone."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(getattr(self._server, method).remote(*args))
        except RayActorError:
            raise UserError(f"{self} is unreachable: its node or the build is gone; run again") from None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, OSError | UserError) else error from None

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        data: bytes | None = self.ask("read", name)
        return data

    def blocks(self, name: str) -> Iterator[bytes]:
        """Stream a file from start to end."""
        start = 0
        while block := self.ask("block", name, start):
            yield block
            start += len(block)

    def sink(self, draft: str, header: bytes = b"") -> Sink:
        """Open a draft for writing after its header, a block at a time."""
        return ServedSink(self, draft, len(header))


class ServedSink:
    """A draft in the builder's folder, written sequentially through its folder server."""

    def __init__(self, storage: ServedFolder, draft: str, start: int) -> None:
        self._storage, self._draft, self._at = storage, draft, start

    def append(self, data: np.ndarray) -> None:
        """Write the next bytes (uint8); one block is in flight at a time, so that Ray's store stays small."""
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            self._storage.ask("put", self._draft, self._at, block)
            self._at += len(block)

    def finish(self) -> None:
        """Flush the draft to disk."""
        self._storage.ask("sync", self._draft)

    def close(self) -> None:
        """Do nothing: the folder server closes the file after each write."""


SERVED = "folder-server:"  # prefix of addresses that are valid within one build only
