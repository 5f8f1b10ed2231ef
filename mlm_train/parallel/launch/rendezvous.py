"""The rendezvous of torchrun's agents and of the ranks.

On one node it is a store that listens on loopback alone: torch's own stores listen on every interface, and
its "c10d" rendezvous, which several nodes use, unpickles what it finds in one.
"""

import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

from mlm_train.errors import PeerFailure, UserError

LOOPBACK = "loopback"  # the name of this rendezvous for torch
_HOST = "127.0.0.1"
_STORE_SECONDS = 600  # timeout of the store
_HOST_SECONDS = 60  # until the node of --rendezvous listens
_LAUNCH, _STARTS, _START = "mlm-train/launch", "mlm-train/starts", "mlm-train/start"  # keys of the store


class _Loopback(StaticTCPRendezvous):
    """One node whose ranks use the agent's store; each attempt gets a new one, without old keys."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        super().__init__(_HOST, 0, rank=0, world_size=1, run_id=parameters.run_id, timeout=_STORE_SECONDS)
        self.starts = 0

    def next_rendezvous(self) -> RendezvousInfo:
        """The store for the ranks that are started next."""
        listener = socket.create_server((_HOST, 0))
        self.master_port = listener.getsockname()[1]
        self._store = TCPStore(
            _HOST,
            self.master_port,
            is_master=True,
            timeout=self.timeout,
            master_listen_fd=listener.detach(),
        )
        self._store.set(_LAUNCH, self.run_id)
        self._store.add(_STARTS, self.starts)
        self.starts += 1
        return super().next_rendezvous()

    def get_backend(self) -> str:
        """The name of this rendezvous; torch compares it with the requested one."""
        return LOOPBACK


rendezvous_handler_registry.register(LOOPBACK, _Loopback)


def start_of_ranks(store: Store, node: int) -> str:
    """`LAUNCH NUMBER`: this launch's own name, and how often its ranks have been started, alike on all nodes.

    store: of this start. node: the number of this node in it.
    """
    if node == 0:
        assert isinstance(store, PrefixStore)
        common = store.underlying_store  # of all starts
        launch = common.compare_set(_LAUNCH, "", uuid.uuid4().hex).decode()
        store.set(_START, f"{launch} {common.add(_STARTS, 1)}")
    return str(store.get(_START).decode())


def wait_at_most(handler: RendezvousHandler, seconds: float) -> None:
    """Have the next rendezvous fail where too few nodes have joined after so long."""
    if isinstance(handler, DynamicRendezvousHandler):
        timeout = RendezvousTimeout(join=timedelta(seconds=seconds))
        handler._settings = replace(handler._settings, timeout=timeout)


class Members:
    """The nodes on which the ranks run; a single node without a rendezvous has none.

    torch has no public name for them. handler: a rendezvous that this node has joined. used: how many of its
    nodes the run uses.
    """

    def __init__(self, handler: RendezvousHandler, used: int) -> None:
        self.handler = handler if isinstance(handler, DynamicRendezvousHandler) else None
        self.nodes = {node for node, rank in self._joined().items() if rank < used}

    def gone(self) -> str:
        """Those that have left since, or have given no sign for 15 s; empty where all are there."""
        if self.handler is None or self.handler._state_holder.state.closed:  # they end
            return ""
        return _named(self.nodes - self._joined().keys())

    def change_from(self, before: "Members") -> str:
        """A line about the nodes, where others ran the ranks before."""
        lost, new = _named(before.nodes - self.nodes), _named(self.nodes - before.nodes)
        if not before.nodes or not (lost or new):
            return ""
        changes = [f"without {lost}"] * bool(lost) + [f"with {new}"] * bool(new)
        return f"the run goes on {' and '.join(changes)}, on {len(self.nodes)} nodes"

    def _joined(self) -> dict[Any, int]:
        if self.handler is None:
            return {}
        with self.handler._heartbeat_lock:  # whose thread changes them
            return dict(self.handler._state_holder.state.participants)


def _named(nodes: Iterable[Any]) -> str:
    return ", ".join(sorted(f"{node.addr} (process {node.pid})" for node in nodes))


class EndedElsewhere(PeerFailure):
    """The run has ended, or gone on, without this node, which cannot know how."""


class NoHost(UserError):
    """The node of --rendezvous does not answer: not yet started, unreachable, or its run has ended."""


@contextlib.contextmanager
def rendezvous_errors(endpoint: str, nodes: int, joined: Callable[[], bool]) -> Iterator[None]:
    """Check the endpoint HOST:PORT, and turn torch's rendezvous errors in the body into one line.

    They are UserError until `joined()`; afterwards the failure is another node's: PeerFailure.
    """
    _check_endpoint(endpoint)
    try:
        yield
    except RendezvousClosedError:
        raise EndedElsewhere("the run has ended on another node") from None
    except RendezvousError as error:
        if joined():
            if isinstance(error, RendezvousTimeoutError):
                raise PeerFailure(f"fewer than {nodes} nodes are left, which the run needs") from None
            line = f"the node of --rendezvous {endpoint} is gone or has ended: {error}"
            raise EndedElsewhere(line) from None
        raise _not_joined(endpoint, nodes, error) from None


def _not_joined(endpoint: str, nodes: int, error: RendezvousError) -> UserError:
    """The error for nodes that did not join."""
    if isinstance(error, RendezvousTimeoutError):
        return UserError(
            f"--rendezvous {endpoint}: not all of {nodes} nodes joined; start the same command on each"
        )
    return NoHost(
        f"--rendezvous {endpoint}: no run of this command answers there; start it on that node too, or "
        "give another port, the same on every node"
    )


def _check_endpoint(endpoint: str) -> None:
    """Raise UserError for a malformed endpoint, another node that does not listen, or a port in use here.

    torch would wait there for ever, or join another run.
    """
    try:
        host, port = parse_rendezvous_endpoint(endpoint, default_port=-1)
    except ValueError:
        host, port = "", -1
    if not host or not 0 < port < 2**16:
        raise UserError(f"--rendezvous {endpoint}: give HOST:PORT, such as node1:29500")
    if not _matches_machine_hostname(host):
        _wait_for(endpoint, host, port)
        return
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        listener = _listener(port)
        here = psutil.Process()
        if listener not in (None, here) and listener.cmdline()[1:] == here.cmdline()[1:]:
            return  # another agent of this run: several may share a machine
        reason = f"taken by {listener.name()}, process {listener.pid}" if listener else str(error.strerror)
        raise UserError(
            f"--rendezvous {endpoint}: this port cannot be used on this node ({reason}); give another one, "
            "the same on every node"
        ) from None


def _wait_for(endpoint: str, host: str, port: int) -> None:
    """Wait until another node listens there; it may start after this one. torch's own wait logs too much."""
    end = time.monotonic() + _HOST_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except socket.gaierror as error:
            raise UserError(f"--rendezvous {endpoint}: unknown host ({error.strerror})") from None
        except OSError as error:
            if time.monotonic() > end:
                raise NoHost(
                    f"--rendezvous {endpoint}: nothing answered there for {_HOST_SECONDS} s ({error}); start "
                    "the same command on that node too, and make its port reachable from here"
                ) from None
        time.sleep(1)


def _listener(port: int) -> psutil.Process | None:
    """The process that listens on a port of this machine; None where it cannot be determined."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid)
    return None
