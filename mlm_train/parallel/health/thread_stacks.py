"""What the threads of this process are doing, found when somebody asks: stacks and flight recorder."""

import faulthandler
import json
import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from torch._C import _distributed_c10d

PACKAGE = Path(__file__).resolve().parents[2]
AWAITED = "awaited"  # how the names of threads begin that the main thread waits for
RECORDS = "1000"  # operations that a rank's flight recorder remembers


class StackPosition(NamedTuple):
    """Of a thread: the communication it is in, its innermost frame, and our own innermost one."""

    operation: str | None
    innermost: str
    ours: str


def keep_flight_records() -> None:
    """Let torch record collectives (it reads this when the first group is made); a user's value stays."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDS)


def main_thread() -> StackPosition:
    """Where the main thread is, or the thread that it waits for.

    In a backward pass on a device that is one of autograd's; else one that is named AWAITED.
    """
    frames = sys._current_frames()
    main = threading.main_thread().ident
    found = _whereabouts(frames[main]) if main in frames else StackPosition(None, "nowhere", "nowhere")
    if found.operation is None and "_engine_run_backward" in found.innermost:
        others = [_whereabouts(frame) for ident, frame in frames.items() if ident != main]
        return next((other for other in others if other.operation), found)
    if "threading.py" in found.innermost:
        awaited = [t.ident for t in threading.enumerate() if t.name.startswith(AWAITED)]
        others = [_whereabouts(frames[ident]) for ident in awaited if ident in frames]
        return next((other for other in others if "_worker" not in other.innermost), found)  # not idle
    return found


def _whereabouts(frame: FrameType) -> StackPosition:
    frames: list[FrameType] = []
    current: FrameType | None = frame
    while current is not None:
        frames.append(current)
        current = current.f_back
    ours = next((f for f in frames if Path(f.f_code.co_filename).is_relative_to(PACKAGE)), frames[-1])
    return StackPosition(_operation(frames), _describe(frames[0]), _describe(ours))


def _operation(frames: list[FrameType]) -> str | None:
    """The name of the communication that a stack, innermost frame first, is in."""
    inner = next(f for f in frames if not f.f_code.co_filename.endswith("torch/_ops.py"))
    name, file = inner.f_code.co_name, inner.f_code.co_filename
    if name == "_wait_batch_p2p":  # of torch.distributed.pipelining
        return "send/recv"
    communicates = file.endswith(("distributed_c10d.py", "_functional_collectives.py", "rendezvous.py"))
    return name.removeprefix("_") if communicates else None


def _describe(frame: FrameType) -> str:
    """file:line function; no source line, which would have to be read from a disk that may hang."""
    path = Path(frame.f_code.co_filename)
    shown = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path
    return f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"


def flight_record() -> dict[str, Any] | None:
    """torch's record of the latest collectives: NCCL's, or the one of gloo; None where there is none."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(_distributed_c10d, name, None)
        record = json.loads(dump(True, False)) if dump is not None else {}
        if record.get("entries"):
            return record
    return None


def pending(record: dict[str, Any] | None) -> list[str]:
    """Operations of a record that were begun and are not complete, oldest first."""
    entries = record["entries"] if record is not None else []
    return [e["profiling_name"] for e in entries if not e["retired"] and e["state"] != "completed"]


def write_evidence(folder: Path, rank: int, report: str, record: dict[str, Any] | None) -> None:
    """rank-N.txt: the report and the stacks of all threads; rank-N.flight.json: the flight recorder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank:05}.txt").open("w", encoding="utf-8") as file:
        file.write(f"{report}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    if record is not None:
        (folder / f"rank-{rank:05}.flight.json").write_text(json.dumps(record), encoding="utf-8")
