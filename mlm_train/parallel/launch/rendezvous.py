"""Where torchrun's agents and the ranks meet.

On one machine: a store that listens on loopback alone. torch's own stores listen on every interface, and its
"c10d" rendezvous, which several machines use, unpickles what it finds in one.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import psutil
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

from mlm_train.errors import PeerFailure, UserError

LOOPBACK = "loopback"  # the name of this rendezvous for torch
_HOST = "127.0.0.1"
_SECONDS = 600  # for an answer of the store
_HOST_SECONDS = 60  # until the machine of --rendezvous listens


class _Loopback(StaticTCPRendezvous):
    """One node, whose ranks use the agent's store; each life of them another one, without old keys."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        super().__init__(_HOST, 0, rank=0, world_size=1, run_id=parameters.run_id, timeout=_SECONDS)

    def next_rendezvous(self) -> RendezvousInfo:
        """Where the ranks meet that are started now."""
        listener = socket.create_server((_HOST, 0))
        self.master_port = listener.getsockname()[1]
        self._store = TCPStore(
            _HOST,
            self.master_port,
            is_master=True,
            timeout=self.timeout,
            master_listen_fd=listener.detach(),
        )
        return super().next_rendezvous()

    def get_backend(self) -> str:
        """Its name, which torch compares with the one that was asked for."""
        return LOOPBACK


rendezvous_handler_registry.register(LOOPBACK, _Loopback)


@contextlib.contextmanager
def met_at(endpoint: str, nodes: int, met: Callable[[], bool]) -> Iterator[None]:
    """Meet the agents of other machines at HOST:PORT; UserError where that cannot be, in one line.

    Once they have met, a failure is another machine's: PeerFailure.
    """
    _check(endpoint)
    try:
        yield
    except RendezvousClosedError:
        raise PeerFailure("the run has ended on another machine") from None
    except RendezvousError as error:
        if met():
            raise PeerFailure(
                f"the machine of --rendezvous {endpoint} is gone, or has ended: {error}"
            ) from None
        raise _unmet(endpoint, nodes, error) from None


def _unmet(endpoint: str, nodes: int, error: RendezvousError) -> UserError:
    """Why the machines did not meet."""
    if isinstance(error, RendezvousTimeoutError):
        return UserError(
            f"--rendezvous {endpoint}: not all of {nodes} machines came; start the same command on each"
        )
    return UserError(
        f"--rendezvous {endpoint}: no run of this command answers there; start it there too, or give "
        "another port, the same on every machine"
    )


def _check(endpoint: str) -> None:
    """Refuse what is no endpoint, another machine that does not listen, and a port of this one that is taken:
    torch would wait there for ever, or join another run.
    """
    try:
        host, port = parse_rendezvous_endpoint(endpoint, default_port=-1)
    except ValueError:
        host, port = "", -1
    if not host or not 0 < port < 2**16:
        raise UserError(f"--rendezvous {endpoint}: give HOST:PORT, such as node1:29500")
    if not _matches_machine_hostname(host):
        _await(endpoint, host, port)
        return
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        taken_by = _listener(port)
        here = psutil.Process()
        if taken_by not in (None, here) and taken_by.cmdline()[1:] == here.cmdline()[1:]:
            return  # another agent of this run: several may share a machine
        who = f"taken by {taken_by.name()}, process {taken_by.pid}" if taken_by else str(error.strerror)
        raise UserError(
            f"--rendezvous {endpoint}: that port of this machine cannot be used ({who}); give another one, "
            "the same on every machine"
        ) from None


def _await(endpoint: str, host: str, port: int) -> None:
    """Until another machine listens there, which may start after this one; torch's wait fills the screen."""
    end = time.monotonic() + _HOST_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except socket.gaierror as error:
            raise UserError(f"--rendezvous {endpoint}: no machine of that name ({error.strerror})") from None
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--rendezvous {endpoint}: nothing answered there for {_HOST_SECONDS} s ({error}); start "
                    "the same command on that machine too, and let this one reach its port"
                ) from None
        time.sleep(1)


def _listener(port: int) -> psutil.Process | None:
    """The process that listens at a port of this machine, where it may be seen."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return psutil.Process(connection.pid)
    return None
