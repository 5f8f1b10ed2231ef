"""Ray: a local instance, private and quiet, or a running cluster."""

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

_MIN_STORE = 128 * 2**20
_NEEDED = ("gcs_server", "raylet")  # Ray's other processes only log and display
_SCRATCH = "mlm-ray-"
_OWNER = "owner"  # file in a scratch folder, locked while the process lives that created it


@contextmanager
def ray_cluster(workers: int, address: str | None = None, shared_bytes: int = 0) -> Iterator[None]:
    """Connect to Ray at `address`, or start a local one with `workers` CPUs; shut it down afterwards.

    `shared_bytes`: what the object store must hold at once. A Ray that this process already uses is used as
    it is. A local one listens on loopback only and requires a random token.
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
                "set RAY_AUTH_MODE=token if it requires a token"
            ) from None
        try:
            yield
        finally:
            _shutdown()
        return
    with _scratch() as scratch:
        local = {
            "address": "local",  # ignores RAY_ADDRESS
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _MIN_STORE + shared_bytes * 5 // 4,
            "_temp_dir": scratch,
        }
        try:
            _start(local | quiet)
            _silence_logs()
            yield
        finally:
            _shutdown()


def _start(options: dict[str, Any]) -> None:
    """Start a local Ray. Raises UserError where it does not start, as on a machine that is very busy."""
    import ray

    try:
        with held(), _on_loopback(), _sigterm_kept():
            ray.init(**options)
    except Exception as error:
        raise UserError(
            f"Ray did not start on this machine: {first_line(error)}; it may be too busy, or `ulimit -n` too "
            "low: run the same command again, or name a running Ray by --ray-address"
        ) from error


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for Ray's files; first removes those that killed processes of this user have left."""
    # Ray creates sockets there, whose paths are limited to about 100 bytes: TMPDIR may be too long.
    root = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    for folder in root.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):
            _remove_abandoned(folder)
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=root))
    descriptor = os.open(scratch / f"{_OWNER}.new", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # without locks, others cannot find it unlocked either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (scratch / f"{_OWNER}.new").rename(scratch / _OWNER)  # locked before others can see it
        yield str(scratch / "ray")
    finally:
        with held():
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove a scratch folder of this user whose owner is gone; one without an owner file is left alone."""
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return
    descriptor = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The owner file goes last: Ray's own processes may live on for half a minute and still write there.
        shutil.rmtree(folder / "ray", ignore_errors=True)
        if not (folder / "ray").exists():
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep this process's SIGTERM handler while Ray starts.

    Ray installs a handler of its own at first, and then, in C++, one that prints a crash report: SIGTERM is
    blocked, here and in threads that start meanwhile, until that one is replaced. Ray's processes still
    receive SIGTERM, by which Ray ends them, but run in their own session: a SIGTERM to this process's group,
    as scripts send it, would end one of them first, and that would end this process.
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
    restore = _sigterm_restorer()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        utils.set_sigterm_handler, services.ConsolePopen = usual, popen
        restore()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _sigterm_restorer() -> Callable[[], object]:
    """A function that restores the current SIGTERM handler; it does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    handler = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    return lambda: signal.signal(signal.SIGTERM, handler)


def _shutdown() -> None:
    """Shut Ray down. It resets SIGTERM, then takes a second to end its processes: restore ours in between."""
    import ray
    from ray._private import worker

    restore, node = _sigterm_restorer(), worker._global_node
    if node is not None:
        kill_all = node.kill_all_processes

        def restore_and_kill(*args: Any, **options: Any) -> None:
            restore()
            kill_all(*args, **options)

        node.kill_all_processes = restore_and_kill
    try:
        with held():
            ray.shutdown()
    finally:
        restore()


def check_resources(needed: Mapping[str, float], fix: str) -> None:
    """Raise a UserError if no running node has the resources of a worker: it would wait for ever.

    In an autoscaling cluster, too, one node of the kind that the build needs must be up.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(kind, 0) >= count for kind, count in needed.items()) for node in nodes):
        return
    required, largest = (
        " and ".join(f"{count:g} {kind}{'s' * (count != 1)}" for kind, count in counts.items())
        for counts in (needed, {kind: max(node.get(kind, 0) for node in nodes) for kind in needed})
    )
    raise UserError(f"a worker needs {required}, and no node in Ray has that (at most {largest}); {fix}")


def check_ray() -> None:
    """Raise a UserError once a process of the Ray that this process started is gone.

    Otherwise Ray would end this process some seconds or a minute later, in the middle of a line.
    """
    from ray._private import worker

    node = worker._global_node
    gone = [] if node is None else [name for name, _ in node.dead_processes() if name in _NEEDED]
    if gone:
        raise UserError(
            f"Ray's own process {gone[0]} was killed or ran out of memory; run again: finished work is kept"
        )


def _silence_logs() -> None:
    """Stop Ray from printing its logs when a process dies: a build reports that in one line."""
    from ray._private.worker import global_worker

    global_worker.threads_stopped.set()
    global_worker.gcs_error_subscriber.close()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make Ray's servers listen on 127.0.0.1, as on macOS; on Linux it has no setting for that."""
    from ray._private import ray_constants

    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


def _check_reachable(address: str) -> None:
    """Connect to the port first: Ray itself retries a dead one for minutes."""
    given, name = address, f"--ray-address {address or repr('')}"
    if address == "auto":
        given = os.environ.get("RAY_ADDRESS", "")
        if given in ("", "auto"):
            return  # Ray looks for one on this machine
        name += f" (RAY_ADDRESS={given})"
    host, _, port = given.removeprefix("ray://").rpartition(":")
    if "/" in host or not host or not port.isdigit():
        raise UserError(f"{name}: give HOST:PORT of a running Ray, or auto for the one on this machine")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"{name}: no Ray there ({error}); start one, or leave the option out") from None
