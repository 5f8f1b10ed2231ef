"""What the threads of this process are doing: stacks, and torch's flight recorder of collectives."""

import faulthandler
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch._C import _distributed_c10d

PACKAGE = Path(__file__).resolve().parents[2]
AWAITED = "awaited"  # prefix of the names of threads that the main thread waits for
RECORDS = "1000"  # operations in a rank's flight recorder


class StackPosition(NamedTuple):
    """A thread's communication, its innermost frame, and its innermost frame in this package."""

    operation: str | None
    innermost: str
    ours: str


def keep_flight_records() -> None:
    """Have torch record collectives, unless the user has set it; torch reads this at its first group."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDS)


def main_thread() -> StackPosition:
    """Where the main thread is, or the thread that it waits for.

    That is one of autograd's in a backward pass on a device, else one whose name starts with AWAITED.
    """
    frames = sys._current_frames()
    main = threading.main_thread().ident
    position = _position(frames[main]) if main in frames else StackPosition(None, "nowhere", "nowhere")
    if position.operation is None and "_engine_run_backward" in position.innermost:
        others = [_position(frame) for ident, frame in frames.items() if ident != main]
        return next((other for other in others if other.operation), position)
    if "threading.py" in position.innermost:
        awaited = [t.ident for t in threading.enumerate() if t.name.startswith(AWAITED)]
        others = [_position(frames[ident]) for ident in awaited if ident in frames]
        return next((other for other in others if "_worker" not in other.innermost), position)  # not idle
    return position


def _position(frame: FrameType) -> StackPosition:
    frames: list[FrameType] = []
    current: FrameType | None = frame
    while current is not None:
        frames.append(current)
        current = current.f_back
    ours = next((f for f in frames if Path(f.f_code.co_filename).is_relative_to(PACKAGE)), frames[-1])
    return StackPosition(_operation(frames), _describe(frames[0]), _describe(ours))


def _operation(frames: list[FrameType]) -> str | None:
    """The communication that a stack, innermost frame first, is in; None where it is in none."""
    inner = next(f for f in frames if not f.f_code.co_filename.endswith("torch/_ops.py"))
    name, file = inner.f_code.co_name, inner.f_code.co_filename
    if name == "_wait_batch_p2p":  # of torch.distributed.pipelining
        return "send/recv"
    communicates = file.endswith(("distributed_c10d.py", "_functional_collectives.py", "rendezvous.py"))
    return name.removeprefix("_") if communicates else None


def _describe(frame: FrameType) -> str:
    """`file:line function`, without the source line: reading it may hang on the disk."""
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path
    return f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"


def flight_record() -> dict[str, Any] | None:
    """torch's record of the latest collectives, of NCCL or else of gloo; None where there is none."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(_distributed_c10d, name, None)
        record = json.loads(dump(True, False)) if dump is not None else {}
        if record.get("entries"):
            return record
    return None


def pending(record: dict[str, Any] | None) -> list[str]:
    """Operations of a record that were started and are not complete, oldest first."""
    entries = record["entries"] if record is not None else []
    return [e["profiling_name"] for e in entries if not e["retired"] and e["state"] != "completed"]


def write_evidence(files: Path, rank: int, report: str, record: dict[str, Any] | None) -> None:
    """Add a rank's report and the stacks of all threads to FILES.txt, its record to FILES.flight.jsonl.

    The ranks of a node have the same files: a shared folder need not hold thousands.
    """
    files.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        append(files.with_name(f"{files.name}.txt"), f"{report}\n\n{file.read()}\n")
    if record is not None:
        line = json.dumps({"rank": rank} | record)
        append(files.with_name(f"{files.name}.flight.jsonl"), f"{line}\n")


def append(path: Path, text: str) -> None:
    """Add text to a file that other processes of this node add to: in one piece."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
