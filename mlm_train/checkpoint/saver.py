"""Asynchronous saves: the state is copied at once, and a background thread writes it during training."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mlm_train.checkpoint.folders import newest
from mlm_train.checkpoint.manifest import Validation
from mlm_train.checkpoint.save import Snapshot, take_snapshot, write_checkpoint
from mlm_train.checkpoint.upload import Uploads
from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.monitor.report import Saved
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.priority import yield_to_training

FAILURES = 3  # failed saves in a row that end the run: a disk may be full for a while
LOOK = 1.0  # seconds between looks at its progress
LEAVE = 60.0  # seconds that a failing run waits for a checkpoint being written


class Saver:
    """Saves at most one checkpoint at a time; all ranks call the same methods at the same steps.

    `committed` is called with each checkpoint that is on disk, `say` with a log line about a failed save.
    """

    def __init__(
        self,
        engine: Engine,
        runtime: Runtime,
        config: Config,
        data: dict[str, Any],
        committed: Callable[[Saved], None],
        say: Callable[[str], None],
    ) -> None:
        self.engine, self.runtime, self.config, self.data = engine, runtime, config, data
        self.committed, self.say = committed, say
        self.root = Path(config.train.output) / "checkpoints"
        # Process groups of its own: the thread's collectives must not mix with the main thread's.
        self.thread_runtime = runtime.for_thread(config.parallel.timeout)
        if not config.checkpoint.async_save:
            runtime.connect()
        url = config.checkpoint.url
        self.uploads = None if url is None else Uploads(url, self.root, config, runtime)
        self.failures = 0
        self.write: _Write | None = None
        self.room: list[Tensor] = []  # in host memory, for the copies of one save after the other

    def save(self, progress: dict[str, Any], validation: Validation | None = None) -> None:
        """Wait for the previous checkpoint, copy the state, and start writing it.

        validation: of the current weights. Raises UserError on every rank after FAILURES failures in a row.
        """
        started = time.monotonic()
        self.settle()
        self.runtime.marker.at("copy")
        snapshot = take_snapshot(
            self.engine, self.runtime, self.config, progress, self.data, validation, self.room
        )
        in_background = self.config.checkpoint.async_save
        runtime = self.thread_runtime if in_background else self.runtime
        self.write = _Write(self.root, snapshot, runtime, self.uploads, started)
        if in_background:
            self.write.start()
        else:
            self.write.run()
        self.write.stall = time.monotonic() - started

    def poll(self) -> None:
        """Report a checkpoint committed since the last call, without waiting."""
        write = self.write
        if write is not None and write.folder is not None and not write.reported:
            write.reported = True
            self.committed(Saved(write.folder, write.seconds, write.stall))
        while self.uploads is not None and self.uploads.lines:
            self.say(self.uploads.lines.popleft())

    def finish(self) -> None:
        """Wait until the last save is on disk, and uploaded. Raises UserError where it is not on disk."""
        error = self.settle()
        if error is not None:
            raise error
        if self.uploads is not None:
            self.uploads.finish(self.runtime)
            self.poll()

    def leave(self) -> None:
        """Give a checkpoint being written up to LEAVE seconds, when the run ends by another failure."""
        if self.write is not None and self.write.is_alive():
            self.runtime.marker.linger()  # not a hang; the marker stays where the failure was
            self.write.join(LEAVE)
        self.poll()

    def settle(self) -> UserError | None:
        """Wait for the checkpoint being written and report it. Returns its UserError, if any."""
        write = self.write
        if write is None:
            return None
        if write.is_alive():
            self._await(write)
        self.poll()
        self.write, error = None, write.error
        if error is None:
            self.failures = 0
            return None
        self.failures += 1
        if not isinstance(error, UserError) or self.failures == FAILURES:
            raise error
        last = newest(self.root)
        kept = "there is no checkpoint yet" if last is None else f"the last good one is {last.name}"
        self.say(f"NOT saved: {error} | {kept}; training continues")
        return error

    def _await(self, write: "_Write") -> None:
        """Wait for the thread, however slow the disk: as long as it makes progress, so does this one."""
        seen = None
        while write.is_alive():
            if write.runtime.marker.mark != seen:
                seen = write.runtime.marker.mark
                self.runtime.marker.at(f"wait for the checkpoint of step {write.snapshot.step}")
            write.join(LOOK)


class _Write(threading.Thread):
    """Writes one snapshot."""

    def __init__(
        self, root: Path, snapshot: Snapshot, runtime: Runtime, uploads: Uploads | None, started: float
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.root, self.snapshot, self.runtime, self.uploads = root, snapshot, runtime, uploads
        self.started = started
        self.stall = self.seconds = 0.0
        self.folder: Path | None = None  # once it is committed
        self.error: Exception | None = None
        self.reported = False

    def run(self) -> None:
        """Write the snapshot, in the thread or called directly."""
        if threading.current_thread() is self:
            yield_to_training()
        try:
            folder = write_checkpoint(self.root, self.snapshot, self.runtime)
            self.seconds = time.monotonic() - self.started
            self.folder = folder  # set last: the main thread polls it
            if self.uploads is not None:
                self.uploads.start(self.runtime)
        except Exception as error:  # raised by `settle`
            self.error = error
