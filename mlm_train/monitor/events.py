"""What a run leaves for people while it trains: log lines and TensorBoard events.

A disk that is full for a while must not end a run over a log line: what it does not take waits in memory.
"""

import contextlib
import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from mlm_train.utils.files import append_regular


class Appended:
    """A file that grows by whole pieces; what could not be written goes with the next one."""

    def __init__(self, path: Path) -> None:
        self.file = append_regular(path)
        self.waiting = bytearray()

    def add(self, piece: bytes) -> None:
        """Write it, after what waits; a part that a full disk took is taken back."""
        self.waiting += piece
        end = os.fstat(self.file.fileno()).st_size
        try:
            block = memoryview(bytes(self.waiting))
            while block:
                block = block[self.file.write(block) :]
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(end)
        else:
            self.waiting.clear()

    def close(self) -> None:
        """A last try, and the end."""
        self.add(b"")
        self.file.close()


class Events:
    """TensorBoard's scalars of a run, in a file of this launch."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """`purge_step`: the first step that this launch will do; earlier launches' events of it are void."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.file = Appended(folder / name)
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=Summary(value=found))

    def _add(self, **fields: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self.file.add(record.getvalue())

    def close(self) -> None:
        """A last try to write what waits."""
        self.file.close()
