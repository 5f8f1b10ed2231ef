"""TensorBoard's events, below train.output/tensorboard."""

import contextlib
import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from mlm_train.config import Config
from mlm_train.monitor.appended import Appended


class TensorBoardWriter:
    """A file of events for each launch, and for each rollback.

    It begins with the first step that will be done, from which on TensorBoard drops what older files hold:
    steps after a crash were not committed, and are not shown twice.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self.folder = Path(config.train.output) / "tensorboard"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self._begun(first_step)

    def _begun(self, first_step: int) -> Appended:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        file = Appended(self.folder / name)
        file.add(_record(file_version="brain.Event:2"))
        file.add(_record(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        return file

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.file.add(_record(step=step, summary=Summary(value=found)))

    def purge(self, step: int) -> None:
        """Go on in a file of its own."""
        before = self.file
        with contextlib.suppress(OSError):  # of a full disk: the old file does
            self.file = self._begun(step)
            before.close()

    def close(self) -> None:
        """A last try to write what waits."""
        self.file.close()


def _record(**fields: object) -> bytes:
    """An event, framed as TensorBoard's files have it."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()
