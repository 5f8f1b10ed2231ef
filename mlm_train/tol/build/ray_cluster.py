"""Ray, started closed and quiet, or a cluster that already runs."""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlm_train.errors import UserError, first_line
from mlm_train.utils.signals import held

_LEAST_STORE = 128 * 2**20
_NEEDED = ("gcs_server", "raylet")  # Ray's other processes only log and show
_SCRATCH = "mlm-ray-"
_OWNER = "owner"  # a file of a scratch folder, locked for as long as the process lives that made it


@contextmanager
def ray_cluster(workers: int, address: str | None = None, shared_bytes: int = 0) -> Iterator[None]:
    """Connect to Ray at `address`, or start one on this machine with `workers` CPUs; end what it began.

    `shared_bytes`: what the object store must hold at once. A Ray that this process already uses is
    taken as it is. A local one listens on loopback alone, and asks for a random token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    import ray  # after the environment: Ray reads it when imported

    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if address is not None:
        _check_reachable(address)
        try:
            with held(), _sigterm_kept():
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--ray-address {address}: {first_line(error)}; start Ray there; "
                "set RAY_AUTH_MODE=token if it wants one"
            ) from None
        try:
            yield
        finally:
            _shutdown()
        return
    with _scratch() as scratch:
        try:
            with held(), _on_loopback(), _sigterm_kept():
                ray.init(
                    address="local",  # whatever RAY_ADDRESS says
                    num_cpus=workers,
                    include_dashboard=False,
                    object_store_memory=_LEAST_STORE + shared_bytes * 5 // 4,
                    _temp_dir=scratch,
                    **quiet,
                )
            _hush()
            yield
        finally:
            _shutdown()


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for Ray's files; those that killed processes of this user have left go."""
    # Ray makes sockets in there, whose paths may have about 100 bytes: a long TMPDIR is no place for it.
    root = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    for folder in root.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            _remove_abandoned(folder)
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=root))
    descriptor = os.open(scratch / f"{_OWNER}.new", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # no locks here: nor will others find it unlocked
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (scratch / f"{_OWNER}.new").rename(scratch / _OWNER)  # locked already: nobody takes it for abandoned
        yield str(scratch / "ray")
    finally:
        with held():
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove a scratch folder of this user whose owner is gone; one without a mark is left alone."""
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return
    descriptor = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The mark goes last: Ray's own processes may live on for half a minute, and still write there.
        shutil.rmtree(folder / "ray", ignore_errors=True)
        if not (folder / "ray").exists():
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray sets its own while it starts, then one that prints a crash report.

    That one is set by Ray's C++: until it is gone again no signal is delivered, neither here nor to threads
    that begin meanwhile. Ray's processes hear SIGTERM as ever, by which Ray ends them, but not one for all of
    this process's group, as scripts send: one that ended first would take this process with it.
    """
    from ray._private import services, utils

    usual, popen = utils.set_sigterm_handler, services.ConsolePopen

    def start(*args: Any, preexec_fn: Callable[[], None] | None = None, **options: Any) -> Any:
        def prepare() -> None:
            if preexec_fn is not None:
                preexec_fn()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

        return popen(*args, preexec_fn=prepare, start_new_session=True, **options)

    utils.set_sigterm_handler, services.ConsolePopen = lambda _: None, start
    hear = _sigterm_again()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        utils.set_sigterm_handler, services.ConsolePopen = usual, popen
        hear()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _sigterm_again() -> Callable[[], object]:
    """What sets the handler of SIGTERM that there is now; only the main thread may set one."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    handler = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    return lambda: signal.signal(signal.SIGTERM, handler)


def _shutdown() -> None:
    """End Ray. It lets go of SIGTERM, then takes a second for its processes: that is heard as before here."""
    import ray
    from ray._private import worker

    hear, node = _sigterm_again(), worker._global_node
    if node is not None:
        end = node.kill_all_processes

        def heard(*args: Any, **options: Any) -> None:
            hear()
            end(*args, **options)

        node.kill_all_processes = heard
    try:
        with held():
            ray.shutdown()
    finally:
        hear()


def check_room(needed: Mapping[str, float], fix: str) -> None:
    """UserError where no node that is up has what a worker needs: it would wait for ever.

    Also of a cluster that grows on demand: one node of the kind that the build needs must be up.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(kind, 0) >= count for kind, count in needed.items()) for node in nodes):
        return
    wanted, largest = (
        " and ".join(f"{count:g} {kind}{'s' * (count != 1)}" for kind, count in counts.items())
        for counts in (needed, {kind: max(node.get(kind, 0) for node in nodes) for kind in needed})
    )
    raise UserError(f"a worker needs {wanted}, and no node in Ray has that (at most {largest}); {fix}")


def check_ray() -> None:
    """UserError once a process of the Ray that this process has started is gone.

    Left to itself, Ray would end this process then: after some seconds, or a minute, in the midst of a line.
    """
    from ray._private import worker

    node = worker._global_node
    gone = [] if node is None else [name for name, _ in node.dead_processes() if name in _NEEDED]
    if gone:
        raise UserError(
            f"Ray's own process {gone[0]} was killed, or found no memory; run again: what is finished is kept"
        )


def _hush() -> None:
    """Have Ray not print pages of its logs where a process dies: a build says itself what that comes to."""
    from ray._private.worker import global_worker

    global_worker.threads_stopped.set()
    global_worker.gcs_error_subscriber.close()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray give its servers 127.0.0.1, as it does on macOS; on Linux it has no setting for that."""
    from ray._private import ray_constants

    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def _check_reachable(address: str) -> None:
    """Ask the port first: Ray itself tries a dead one for minutes."""
    given, name = address, f"--ray-address {address or repr('')}"
    if address == "auto":
        given = os.environ.get("RAY_ADDRESS", "")
        if given in ("", "auto"):
            return  # Ray looks for one that runs on this machine
        name += f" (RAY_ADDRESS={given})"
    host, _, port = given.removeprefix("ray://").rpartition(":")
    if "/" in host or not host or not port.isdigit():
        raise UserError(f"{name}: give HOST:PORT of a running Ray, or auto for that of this machine")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{name}: no Ray there ({error}); start one, or leave it out") from None
