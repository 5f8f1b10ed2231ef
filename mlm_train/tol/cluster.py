"""Ray, started closed and quiet, or a cluster that already runs."""

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlm_train.errors import UserError

_LEAST_STORE = 128 * 2**20
_NEEDED = ("gcs_server", "raylet")  # Ray's other processes only log and show


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
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"--ray-address {address}: {reason}; start Ray there; set RAY_AUTH_MODE=token if it wants one"
            ) from None
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Ray makes sockets in there, whose paths may have about 100 bytes: a long TMPDIR is no place for it.
    scratch = tempfile.mkdtemp(prefix="mlm-ray-", dir="/tmp" if Path("/tmp").is_dir() else None)
    try:
        with _on_loopback():
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
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


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
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdigit():
        return  # auto, or a form that only Ray understands
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray-address {address}: no Ray there ({error}); start one, or leave it out"
        ) from None
