"""Fetch checkpoints from a URL into a folder, where they are committed like any others."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mlm_train.checkpoint.folders import NAME, PARTIAL, commit, make_partial, newest
from mlm_train.checkpoint.keep import Keep, step_of
from mlm_train.checkpoint.manifest import MANIFEST, Damaged, Manifest, parse_manifest
from mlm_train.checkpoint.store import CheckpointStore, mine_of
from mlm_train.config import Config
from mlm_train.errors import SharedUserError, UserError
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.files import finished, replace_file, writing
from mlm_train.utils.records import FileRecord
from mlm_train.utils.run_lock import Attempt
from mlm_train.utils.units import in_units

Fits = Callable[[str, Manifest], None]  # raises UserError where a run cannot continue from a checkpoint


class _Begun(NamedTuple):
    """A checkpoint that is being fetched, or what is wrong with it."""

    files: Sequence[FileRecord] = ()
    manifest: bytes = b""
    fault: str | None = None


def fetch_newer(config: Config, runtime: Runtime, fits: Fits) -> list[str]:
    """Fetch the newest checkpoint of checkpoint.url, if it is newer than the run's own; every rank calls it.

    Each file is read once, by one rank, and compared with its checksum. Returns log lines. Raises UserError,
    on every rank, where the URL does not answer and the run's folder has no checkpoint, and for a damaged one
    unless checkpoint.fall_back allows an older one.
    """
    url, root = config.checkpoint.url, Path(config.train.output) / "checkpoints"
    if url is None:
        return []
    candidates, lines = runtime.broadcast(lambda: _newer(url, root, config.checkpoint.resume))
    for name in candidates:
        started = time.monotonic()
        files, manifest, fault = runtime.broadcast(partial(_begin, url, root, name, fits))
        try:
            fault = fault or _fault(url, root, name, files, runtime)
            if fault is None:
                runtime.broadcast(partial(_finish, root, name, manifest, Keep.of(config.checkpoint)))
                return [*lines, f"{name} fetched from {url} in {time.monotonic() - started:.1f} s"]
        finally:
            if runtime.is_rank_0:
                shutil.rmtree(_partial(root, name), ignore_errors=True)
        if not config.checkpoint.fall_back:
            raise SharedUserError(f"{fault}; remove {url}/{name} to use an older one")
        lines.append(f"{name} at {url} is damaged ({fault}): an older one is used")
    if candidates and runtime.broadcast(lambda: newest(root)) is None:
        raise SharedUserError(f"all checkpoints at {url} are damaged: give another one to start over")
    return lines


def _fault(url: str, root: Path, name: str, files: Sequence[FileRecord], runtime: Runtime) -> str | None:
    """Fetch the files on all ranks together. Returns what is wrong with the first damaged one, if any."""
    found: list[str] = []

    def work() -> Iterator[None]:
        mine = mine_of(files, runtime.topology.rank, runtime.topology.world)
        found.extend((yield from CheckpointStore(url).download(name, mine, _partial(root, name))))

    runtime.in_rounds(f"fetch {name}", work())
    return next((fault for faults in runtime.gather(lambda: found) for fault in faults), None)


def fetch_checkpoint(url: str, run: Path) -> Path:
    """Fetch a checkpoint, or the newest of a URL, into a new folder RUN/checkpoints. Returns its folder."""
    store, name = opened(url)
    if name is None:
        name = committed_at(store)[-1]
    root = run / "checkpoints"
    files, manifest, fault = _begin(str(store), root, name, lambda *_: None)
    faults = [] if fault else finished(store.download(name, files, _partial(root, name)))
    if fault or faults:
        shutil.rmtree(_partial(root, name), ignore_errors=True)
        raise UserError(f"{fault or faults[0]}; fetch an older one: mlm-train checkpoint list {store}")
    return _finish(root, name, manifest, Keep(10**9))


def opened(url: str) -> tuple[CheckpointStore, str | None]:
    """The store of a URL, and the checkpoint that the URL names, if it names one."""
    root, _, last = url.rstrip("/").rpartition("/")
    return (CheckpointStore(root), last) if NAME.fullmatch(last) else (CheckpointStore(url), None)


def committed_at(store: CheckpointStore) -> list[str]:
    """Names of a store's checkpoints, oldest first; UserError where there is none."""
    if not (names := store.committed()):
        raise UserError(f"{store} holds no checkpoint: give the checkpoint.url of a run")
    return names


def _newer(url: str, root: Path, resume: bool) -> tuple[list[str], list[str]]:
    """Names of the checkpoints that are newer than all in `root`, newest first; log lines."""
    here = newest(root)
    try:
        names = CheckpointStore(url).committed()
    except UserError as error:
        if here is not None:
            return [], [f"{error} | the newest checkpoint of the run's folder is used"]
        raise UserError(f"{error}, or leave checkpoint.url out") from None
    if names and not resume:
        raise UserError(
            f"checkpoint.url={url} holds checkpoints and checkpoint.resume=false: nothing is overwritten; "
            "give another URL"
        )
    done = -1 if here is None else step_of(here)
    return [name for name in reversed(names) if step_of(Path(name)) > done], []


def _partial(root: Path, name: str) -> Path:
    return root / f"{PARTIAL}fetched-{name}{Attempt.suffix()}"


def _begin(url: str, root: Path, name: str, fits: Fits) -> _Begun:
    """Read a checkpoint's manifest, see that it fits, and make an empty folder for its files."""
    store = CheckpointStore(url)
    data = store.manifest_bytes(name)
    try:
        manifest = parse_manifest(data, store.at(name))
    except Damaged as error:
        return _Begun(fault=error.fault)
    fits(store.at(name), manifest)
    folder, size = _partial(root, name), sum(entry.bytes for entry in manifest.every_file)
    if (free := make_partial(folder, size)) is not None:
        raise UserError(
            f"{store.at(name)} needs {in_units(size)}, but {root} has {in_units(free)} free: free space, or "
            "choose another folder"
        )
    return _Begun(manifest.every_file, data or b"")


def _finish(root: Path, name: str, manifest: bytes, keep: Keep) -> Path:
    """Commit the fetched files."""
    with writing(root):
        replace_file(_partial(root, name) / MANIFEST, manifest)
        commit(_partial(root, name), root / name, keep)
    return root / name
