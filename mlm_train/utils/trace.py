"""Spans of time of this process's threads, as a Chrome trace: for Perfetto or chrome://tracing."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from mlm_train.errors import UserError
from mlm_train.utils.files import write_text, writing
from mlm_train.utils.records import read_json


class Trace:
    """What was done when, by which thread. Any thread may add to it."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._threads: dict[int, str] = {}

    def add(self, name: str, started: int, about: Mapping[str, Any]) -> None:
        """A span of this thread, from `started` (time.perf_counter_ns) until now."""
        ended, thread = time.perf_counter_ns(), threading.get_native_id()
        self._threads[thread] = threading.current_thread().name
        span = {"name": name, "ph": "X", "ts": started / 1e3, "dur": (ended - started) / 1e3}  # microseconds
        self._events.append({**span, "pid": os.getpid(), "tid": thread, "args": dict(about)})

    @contextlib.contextmanager
    def spanning(self, name: str, about: Mapping[str, Any]) -> Iterator[None]:
        """Add the time of the body, however it ends."""
        started = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, started, about)

    def write(self, path: Path) -> None:
        """Write the JSON. UserError where that is not possible."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": thread, "args": {"name": name}}
            for thread, name in list(self._threads.items())  # a thread may end its last span
        ]
        with writing(path):
            write_text(path, json.dumps({"traceEvents": [*names, *self._events], "displayTimeUnit": "ms"}))


_NOTHING = contextlib.nullcontext()
_recording: Trace | None = None


@contextlib.contextmanager
def recording() -> Iterator[Trace]:
    """Record the spans of all threads while the body runs; one recording at a time."""
    global _recording
    if _recording is not None:
        raise UserError("a trace is being recorded already: end that one first")
    _recording = trace = Trace()
    try:
        yield trace
    finally:
        _recording = None


def span(name: str, about: NamedTuple) -> AbstractContextManager[None]:
    """Add the time of the body to the recording, if there is one; about: shown with it, by field."""
    trace = _recording  # once: it may end meanwhile
    return _NOTHING if trace is None else trace.spanning(name, about._asdict())


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The spans of a trace that `Trace.write` wrote. UserError for another file."""
    fix = "give a file of `mlm-train generate --trace`"
    events = read_json(path, fix).get("traceEvents")
    try:
        spans = [event for event in events or () if event["ph"] == "X"]
        for event in spans:
            _ = f"{event['name']}", event["ts"] + event["dur"], event["tid"], event["args"].items()
    except (TypeError, KeyError, AttributeError):
        spans = []
    if not spans:
        raise UserError(f"{path} is not a trace with spans; {fix}")
    return spans


def is_trace(path: Path) -> bool:
    """Whether a file is a trace."""
    try:
        return bool(read_trace(path))
    except UserError:
        return False
