"""Copies of a run's checkpoints at checkpoint.url: each rank uploads its own files, beside training.

A store that fails or is slow stops nothing: a log line says so, and the next checkpoint brings the copies up
to date again.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mlm_train.checkpoint.folders import committed
from mlm_train.checkpoint.keep import NEWEST, Keep, Manifests, step_of
from mlm_train.checkpoint.manifest import MANIFEST
from mlm_train.checkpoint.store import CheckpointStore, mine_of
from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.parallel.health.failures import one_line
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils import url_folder
from mlm_train.utils.priority import yield_to_training
from mlm_train.utils.records import FileRecord
from mlm_train.utils.urls import redacted


class _Missing(NamedTuple):
    """A checkpoint that the store lacks; `manifest`: its bytes, since the folder may soon be deleted."""

    folder: Path
    files: Sequence[FileRecord]
    manifest: bytes


class Uploads:
    """Brings checkpoint.url up to date after a commit; all ranks call the same methods."""

    def __init__(self, url: str, root: Path, config: Config, runtime: Runtime) -> None:
        self.url, self.root, self.keep = url, root, Keep.of(config.checkpoint)
        # A call to a store may take PATIENCE seconds until it is given up, and the other ranks wait for it.
        self.runtime = runtime.for_thread(max(config.parallel.timeout, 4 * url_folder.PATIENCE))
        self.lines: deque[str] = deque()  # for the log
        self.thread: threading.Thread | None = None
        self.behind = False  # whether a checkpoint was committed while another one was uploaded

    def start(self, runtime: Runtime) -> None:
        """Upload what the store lacks, unless an earlier upload still runs. runtime: the caller's."""
        self.behind = any(runtime.gather(self._running))
        if self.behind:
            self.lines.append(
                f"NOT uploaded: {redacted(self.url)} still gets an earlier checkpoint than "
                f"{committed(self.root)[-1].name}: save less often, or use a faster store"
            )
            return
        self.thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self.thread.start()

    def finish(self, runtime: Runtime) -> None:
        """Wait until the store has the newest checkpoint, or has failed."""
        self._wait(runtime)
        if self.behind:
            self.start(runtime)
            self._wait(runtime)

    def _running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def _wait(self, runtime: Runtime) -> None:
        while self.thread is not None and self.thread.is_alive():
            runtime.marker.at(f"wait for the upload to {redacted(self.url)}")
            runtime.marker.linger()  # each of its steps is limited
            self.thread.join(1.0)

    def _run(self) -> None:
        yield_to_training()
        try:
            self._bring_up_to_date()
        except UserError as error:
            self.lines.append(f"NOT uploaded: {error} | training continues; the next checkpoint tries again")
        except Exception as error:  # of another rank that is gone, which ends the run
            self.lines.append(f"NOT uploaded to {redacted(self.url)}: {one_line(error)}")

    def _bring_up_to_date(self) -> None:
        for folder, files, manifest in self.runtime.broadcast(self._missing):
            started = time.monotonic()
            self.runtime.in_rounds(f"upload {folder.name}", self._upload(folder, files))
            self.runtime.broadcast(partial(self._commit, folder, manifest))
            seconds = time.monotonic() - started
            self.lines.append(f"{folder.name} uploaded to {redacted(self.url)} in {seconds:.1f} s")
        self.runtime.broadcast(lambda: CheckpointStore(self.url).prune(self.keep))

    def _missing(self) -> list[_Missing]:
        """The newest checkpoint, and older ones that are kept on purpose, which the store lacks."""
        store, folders = CheckpointStore(self.url), committed(self.root)
        there, newest = store.committed(), folders[-1]
        if there and step_of(Path(there[-1])) > step_of(newest):
            raise UserError(
                f"{store} holds {there[-1]}, and this run is at {newest.name}: give each run another "
                "checkpoint.url, or remove what is there"
            )
        manifests, missing = Manifests(), list[_Missing]()
        for folder, reasons in reversed(self.keep.reasons(folders, manifests).items()):
            if folder != newest and not set(reasons) - {NEWEST}:
                continue
            data = (folder / MANIFEST).read_bytes()
            if folder.name not in there or store.manifest_bytes(folder.name) != data:
                store.withdraw(folder.name)
                missing.append(_Missing(folder, manifests.of(folder).every_file, data))
        return missing

    def _upload(self, folder: Path, files: Sequence[FileRecord]) -> Iterator[None]:
        mine = mine_of(files, self.runtime.topology.rank, self.runtime.topology.world)
        if mine:
            yield from CheckpointStore(self.url).upload(folder, mine)

    def _commit(self, folder: Path, manifest: bytes) -> None:
        CheckpointStore(self.url).commit(folder.name, manifest)
