"""TensorBoard event files: of a run in train.output/tensorboard."""

import contextlib
import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from mlm_train.config import Config
from mlm_train.monitor.appended import Appended


class EventFiles:
    """Scalars in a folder, in one event file per launch and per rollback.

    A file starts with its first step, from which on TensorBoard drops events of older files, so that steps
    repeated after a crash are not shown twice. first_step None: what others wrote there stays.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self._open(first_step)

    def _open(self, first_step: int | None) -> Appended:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        file = Appended(self.folder / name)
        file.add(_record(file_version="brain.Event:2"))
        if first_step is not None:
            file.add(_record(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        return file

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.file.add(_record(step=step, summary=Summary(value=entries)))

    def purge(self, step: int) -> None:
        """Continue in a new file."""
        before = self.file
        with contextlib.suppress(OSError):  # a full disk: keep the old file
            self.file = self._open(step)
            before.close()

    def close(self) -> None:
        """Try once more to write waiting events, then close."""
        self.file.close()


class TensorBoardWriter(EventFiles):
    """The metrics writer of a run."""

    def __init__(self, config: Config, first_step: int) -> None:
        super().__init__(Path(config.train.output) / "tensorboard", first_step)


def _record(**fields: object) -> bytes:
    """An event in the framing of TensorBoard's files."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()
