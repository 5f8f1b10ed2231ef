"""Copying a finished table to every node of a cluster."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import track

from mlm_train.errors import UserError, first_line
from mlm_train.tol.build.ray_cluster import ray_cluster
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.storage.node_folders import NodeFolder, ServedFolder, expanded, on_node


def copy_to_nodes(storage: NodeFolder, ray_address: str | None) -> int:
    """Copy this node's finished table to every other node of the cluster; return their number.

    An interrupted copy resumes; intact files are kept. Raises UserError naming the first node where it
    failed, once all have ended.
    """
    if ray_address is None:
        return 0  # a local Ray has no other nodes
    import ray

    with ray_cluster(1, ray_address), storage.served():
        here = ray.get_runtime_context().get_node_id()
        names = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
        copy = ray.remote(num_cpus=0, max_retries=0)(_copy_here)
        running = {
            copy.options(scheduling_strategy=on_node(node)).remote(storage.address, storage.asked): name
            for node, name in names.items()
            if node != here
        }
        failed = []
        ended = _as_completed(list(running))
        console = Console(stderr=True)
        hidden = not console.is_terminal
        for task in track(ended, "nodes", len(running), console=console, disable=hidden, transient=True):
            if (reason := _failure(task)) is not None:
                failed.append(f"node {running[task]}: {reason}")
        if failed:
            more = f" (and {len(failed) - 1} more nodes)" if len(failed) > 1 else ""
            raise UserError(f"{failed[0]}{more}; run again: copied files are kept")
        return len(running)


def _copy_here(address: str, path: str) -> None:
    from mlm_train.tol.tools.fetch import copy_table

    copy_table(ServedFolder(address), LocalFolder(expanded(path)))


def _as_completed(running: list[Any]) -> Iterator[Any]:
    import ray

    while running:
        (task,), running = ray.wait(running)
        yield task


def _failure(task: Any) -> str | None:
    """Why a copy failed; None if it did not."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.get(task)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        return first_line(cause)
    return None
