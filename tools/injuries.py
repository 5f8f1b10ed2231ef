"""Faults that tools/chaos.py injects into a run's processes, disk and checkpoints."""

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300.0  # seconds to wait for something that must happen
STEP = re.compile(r"^step (\d+)/\d+ \| loss ")
START = re.compile(r"^(?:started a new run|resumed from \S*step-\d+ at step (\d+))")
NOT_SAVED, COMMITTED, ASIDE = "NOT saved: ", " committed in ", ": kept as damaged-step-"


class Violation(Exception):
    """The run violated a guarantee."""


class Life:
    """One launch of the run, and its output so far."""

    def __init__(self, number: int, command: Sequence[str], output: Path) -> None:
        self.number, self.output, self.began = number, output, time.monotonic()
        self.lines: list[str] = []
        self.step = 0  # the latest step trained in this life
        self.seen: list[float] = []  # times at which its steps were read
        self.start: int | None = None  # the step at which it resumed
        self.rest = ""
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file
            )
        self.reader = output.open(encoding="utf-8", errors="replace")

    def alive(self) -> bool:
        """Read the new output. Returns whether the launch is still running."""
        ended = self.process.poll() is not None
        *lines, self.rest = (self.rest + self.reader.read()).split("\n")
        for line in lines:
            if found := STEP.match(line):
                self.step = int(found[1])
                self.seen.append(time.monotonic())
            elif found := START.match(line):
                self.start = int(found[1] or 0)
        self.lines += lines
        return not ended

    def pace(self) -> float:
        """Seconds per step so far."""
        return (self.seen[-1] - self.seen[0]) / (len(self.seen) - 1) if len(self.seen) > 1 else 0.1

    def count(self, words: str) -> int:
        """Number of lines with these words."""
        return sum(words in line for line in self.lines)

    def until(self, happened: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Wait while the launch lives. Returns whether `happened`."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end and not happened():
            time.sleep(0.01)
        return happened()

    def await_line(self, words: str, seconds: float = PATIENCE) -> bool:
        """Wait for another line with these words."""
        before = self.count(words)
        return self.until(lambda: self.count(words) > before, seconds)

    def ended(self, seconds: float = PATIENCE) -> None:
        """Wait for the end of the launch and of every rank."""
        ranks = self.ranks()
        self.until(lambda: False, seconds)
        if self.process.poll() is None:
            raise Violation(f"life {self.number} did not end within {seconds:.0f} s: {self.output}")
        if not gone(ranks, 30):
            raise Violation(f"life {self.number} ended and left a rank behind: {self.output}")
        self.alive()

    def ranks(self) -> list[psutil.Process]:
        """The training processes."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "pretrain" in child.cmdline()]
        return []

    def kill(self) -> None:
        """Kill everything with SIGKILL, as when a machine is lost."""
        ranks = self.ranks()
        for process in (self.process, *ranks):
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        gone(ranks, 30)
        self.alive()


def gone(processes: Sequence[psutil.Process], seconds: float) -> bool:
    """Wait until the processes have ended; zombies, which nobody may reap, count as ended."""
    end = time.monotonic() + seconds
    while any(_runs(process) for process in processes):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{words[0]} failed")


class Disk:
    """A small tmpfs that holds the run's folder. Needs root."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder, self.ballast = folder, folder / "ballast"
        self.run = folder / "run"
        self.checkpoints = self.run / "checkpoints"
        folder.mkdir(parents=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))

    def fill(self, leave: int) -> None:
        """Fill the disk up to `leave` free bytes."""
        usage = os.statvfs(self.folder)
        surplus = usage.f_bavail * usage.f_frsize - leave
        if surplus > 0:
            descriptor = os.open(self.ballast, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):  # the run has used the space meanwhile
                os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, surplus)
            os.close(descriptor)

    def empty(self) -> None:
        """Free the filled space."""
        self.ballast.unlink(missing_ok=True)

    def protect(self) -> None:
        """Make the checkpoints' folder read-only, also for open files."""
        _run("mount", "--bind", str(self.checkpoints), str(self.checkpoints))
        _run("mount", "-o", "remount,bind,ro", str(self.checkpoints))

    def unprotect(self) -> None:
        """Make the checkpoints' folder writable again."""
        _run("umount", "-l", str(self.checkpoints))

    def unmount(self) -> None:
        """Unmount everything."""
        while True:
            try:
                _run("umount", "-l", str(self.checkpoints))
            except OSError:
                break
        _run("umount", "-l", str(self.folder))


@dataclass
class Event:
    """One injury: its plan (`step`, `early`, `delay`, `strike`) and its result."""

    kind: str
    step: int  # due once the run has passed it
    delay: float  # in steps' durations after that, so that it falls anywhere within a step
    early: bool = False  # due `delay` seconds after the start of a life instead
    strike: bool = False  # kill everything while the injury lasts
    chance: random.Random = field(default_factory=random.Random)
    life: int = 0
    at_step: int = 0
    note: str = ""
    death: int | None = None  # exit code, where the injury ended the life
    seconds: float | None = None  # until steps were trained or a checkpoint was committed again
    when: float = 0.0

    def report(self) -> dict[str, object]:
        """The event for the JSON file."""
        names = ("kind", "life", "at_step", "early", "note", "death", "seconds")
        return {name: getattr(self, name) for name in names}


def _one_of(ranks: Sequence[psutil.Process], event: Event, life: Life) -> psutil.Process:
    """A random rank, recorded in the event's note."""
    if not ranks:
        raise Violation(f"the run was over, or not started, before {event.kind}: {life.output}")
    victim = event.chance.choice(ranks)
    with contextlib.suppress(psutil.Error):
        event.note = f"rank {victim.environ().get('RANK')}"
    return victim


def kill_rank(event: Event, life: Life, disk: Disk) -> set[int]:
    """Kill one rank; launch reports it."""
    ranks = life.ranks()
    if not ranks:
        return kill_all(event, life, disk)
    _one_of(ranks, event, life).kill()
    life.ended()
    return {1}


def kill_all(event: Event, life: Life, disk: Disk) -> set[int]:
    """Kill all processes."""
    life.kill()
    return {-signal.SIGKILL}


def kill_launch_alone(event: Event, life: Life, disk: Disk) -> set[int]:
    """Kill only the launch: the ranks save a checkpoint, end, and release the folder."""
    ranks = life.ranks()
    life.process.kill()
    if not gone(ranks, PATIENCE):
        raise Violation(f"ranks of life {life.number} survive their launch: {life.output}")
    life.ended()
    return {-signal.SIGKILL}


def stop_rank(event: Event, life: Life, disk: Disk) -> set[int]:
    """Stop one rank with SIGSTOP: the watchdog ends the others, torchrun's agent kills it 30 s later."""
    victim = _one_of(life.ranks(), event, life)
    victim.suspend()
    life.until(lambda: life.count("all ranks end with exit code 75") > 0)
    if event.chance.random() < 0.5:
        event.note += ", continued"
        with contextlib.suppress(psutil.Error):
            victim.resume()
    life.ended()
    return {75}


def _truncate(path: Path, chance: random.Random) -> str:
    size = path.stat().st_size
    left = chance.choice(
        (0, size - 2, chance.randrange(size - 1))
    )  # JSON without its last newline would be whole
    os.truncate(path, left)
    return f"{path.name} cut to {left} of {size} bytes"


def _flip(path: Path, chance: random.Random) -> str:
    bits = chance.choice((1, 1, 8))
    with path.open("r+b") as file:
        for _ in range(bits):
            offset = chance.randrange(path.stat().st_size)
            file.seek(offset)
            byte = file.read(1)[0] ^ 1 << chance.randrange(8)
            file.seek(offset)
            file.write(bytes([byte]))
    return f"{bits} bits of {path.name} flipped"


def _remove(path: Path, chance: random.Random) -> str:
    path.unlink()
    return f"{path.name} removed"


def damage(how: Callable[[Path, random.Random], str]) -> "Injury":
    """Damage a file of the newest checkpoint; with `strike` the next life finds it, else it may be gone."""

    def injury(event: Event, life: Life, disk: Disk) -> set[int]:
        life.until(lambda: len(whole(disk.checkpoints)) > 2)  # enough must be left to resume
        if event.strike:
            life.kill()
        newest = whole(disk.checkpoints)[-1]
        mark(newest)
        with contextlib.suppress(FileNotFoundError):  # the run has just deleted it
            victim = event.chance.choice(sorted(newest.iterdir()))
            event.note = f"{newest.name}: {how(victim, event.chance)}"
        return {-signal.SIGKILL} if event.strike else set()

    return injury


_marked: set[int] = set()  # inodes of damaged folders; a tmpfs never reuses one


def mark(folder: Path) -> None:
    """Mark a checkpoint as damaged."""
    with contextlib.suppress(FileNotFoundError):
        _marked.add(folder.stat().st_ino)


def whole(checkpoints: Path) -> list[Path]:
    """Committed and undamaged checkpoints, oldest first."""
    undamaged = []
    for path in sorted(checkpoints.glob("step-*")):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino not in _marked:
                undamaged.append(path)
    return undamaged


def _until_saved_again(
    event: Event, life: Life, press: Callable[[], None], release: Callable[[], None]
) -> set[int]:
    """Call `press` until a failed save is reported; with `strike` then kill all; then call `release`."""
    before = life.count(NOT_SAVED)

    def failed() -> bool:
        press()
        return life.count(NOT_SAVED) > before

    try:
        if not life.until(failed, 60):
            event.note += " (no save failed)" if life.alive() else " (ended)"
        if event.strike and life.alive():
            life.kill()
    finally:
        release()
    if life.alive() and not life.await_line(COMMITTED) and life.alive():
        raise Violation(f"no checkpoint was committed after {event.kind}: {life.output}")
    return {-signal.SIGKILL} if event.strike else {2}


def disk_full(event: Event, life: Life, disk: Disk) -> set[int]:
    """Fill the disk until a save has failed."""
    size = sum(path.stat().st_size for path in whole(disk.checkpoints)[-1].iterdir())
    left = event.chance.choice((0, event.chance.randrange(size)))
    event.note = f"{left} of {size} bytes free"
    return _until_saved_again(event, life, lambda: disk.fill(left), disk.empty)


def write_fails(event: Event, life: Life, disk: Disk) -> set[int]:
    """Limit the file size of one rank, so that its writes fail midway, until a save has failed."""
    limit = event.chance.randrange(20_000)
    victim = _one_of(life.ranks(), event, life)
    event.note += f" after {limit} bytes"
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    victim.rlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def release() -> None:
        with contextlib.suppress(psutil.Error):
            victim.rlimit(resource.RLIMIT_FSIZE, unlimited)

    return _until_saved_again(event, life, lambda: None, release)


def read_only(event: Event, life: Life, disk: Disk) -> set[int]:
    """Make the checkpoints' folder read-only until a save has failed."""
    disk.protect()
    return _until_saved_again(event, life, lambda: None, disk.unprotect)


Injury = Callable[[Event, Life, Disk], set[int]]  # returns the exit codes that may follow
INJURIES: dict[str, Injury] = {
    "kill-rank": kill_rank,
    "kill-all": kill_all,
    "kill-launch": kill_launch_alone,
    "stop-rank": stop_rank,
    "truncate": damage(_truncate),
    "flip-bits": damage(_flip),
    "remove": damage(_remove),
    "disk-full": disk_full,
    "write-fails": write_fails,
    "read-only": read_only,
}
DEADLY = ("kill-rank", "kill-all", "kill-launch", "stop-rank")
