"""Saves a run's checkpoints while it trains on: the state is copied at once, a thread writes the copy."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlm_train.checkpoint.folders import newest
from mlm_train.checkpoint.manifest import Validation
from mlm_train.checkpoint.save import Snapshot, take_snapshot, write_checkpoint
from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.monitor.report import Saved
from mlm_train.parallel.engine.deepspeed_zero import Engine
from mlm_train.parallel.runtime import Runtime

FAILURES = 3  # saves in a row that may fail before the run ends: a disk may be full for a while
LEAVE = 60.0  # seconds that a run which fails waits for a checkpoint that is being written


class Saver:
    """At most one checkpoint is being written; all ranks call the same methods at the same steps.

    `say` takes a line for the user, of a save that failed; `committed` a checkpoint that is on disk.
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
        # The thread's collectives meet no others.
        self.thread_runtime = runtime.for_thread(config.parallel.timeout)
        self.failures = 0
        self.write: _Write | None = None

    def save(self, progress: dict[str, Any], validation: Validation | None = None) -> None:
        """Copy the state, begin to write it; first waits for the checkpoint before.

        validation: of the weights as they are. Raises UserError, on every rank alike, where FAILURES in a row
        could not be written.
        """
        started = time.monotonic()
        self.settle()
        self.runtime.marker.at("copy")
        snapshot = take_snapshot(self.engine, self.runtime, self.config, progress, self.data, validation)
        self.write = _Write(self.root, snapshot, self.thread_runtime, started)
        if self.config.checkpoint.async_save:
            self.write.start()
        else:
            self.write.run()
        self.write.stall = time.monotonic() - started

    def poll(self) -> None:
        """Say what has been committed since the last call; waits for nothing."""
        write = self.write
        if write is not None and write.folder is not None and not write.told:
            write.told = True
            self.committed(Saved(write.folder, write.seconds, write.stall))

    def finish(self) -> None:
        """Wait until what was saved is on disk. Raises UserError where it is not."""
        error = self.settle()
        if error is not None:
            raise error

    def leave(self) -> None:
        """The run ends by a failure of something else: give a checkpoint that is being written its time."""
        if self.write is not None and self.write.is_alive():
            self.runtime.marker.linger()  # no hang, and still where the failure was
            self.write.join(LEAVE)
        self.poll()

    def settle(self) -> UserError | None:
        """Wait for the checkpoint that is being written, tell how it went; its UserError."""
        write = self.write
        if write is None:
            return None
        if write.is_alive():
            self.runtime.marker.at(f"wait for the checkpoint of step {write.snapshot.step}")
            write.join()
        self.poll()
        self.write, error = None, write.error
        if error is None:
            self.failures = 0
            return None
        self.failures += 1
        if not isinstance(error, UserError) or self.failures == FAILURES:
            raise error
        last = newest(self.root)
        kept = "none is there yet" if last is None else f"the last good one is {last.name}"
        self.say(f"NOT saved: {error} | {kept}; training goes on")
        return error


class _Write(threading.Thread):
    """Writes one snapshot."""

    def __init__(self, root: Path, snapshot: Snapshot, runtime: Runtime, started: float) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.root, self.snapshot, self.runtime, self.started = root, snapshot, runtime, started
        self.stall = self.seconds = 0.0
        self.folder: Path | None = None  # once it is committed
        self.error: Exception | None = None
        self.told = False

    def run(self) -> None:
        """In the thread, or at once."""
        try:
            folder = write_checkpoint(self.root, self.snapshot, self.runtime)
            self.seconds = time.monotonic() - self.started
            self.folder = folder  # last: the other thread looks at it
        except Exception as error:  # raised where the run waits for it
            self.error = error
