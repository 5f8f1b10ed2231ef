"""Commands in an order, each run until it has ended once; what has ended is noted in the folder."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.utils.files import write_json, write_text
from mlm_train.utils.records import Record, read_json, record_of
from mlm_train.utils.signals import end_with_parent

FIX = "remove it: its step runs again"
MEASURED = 300.0  # predicted seconds after which this machine's speed is known


@dataclass(frozen=True)
class Step:
    """One `mlm-train` command.

    words: its arguments; it runs in the folder of all results, to which relative paths belong. needs: names
    of steps before it. prints: the file that its standard output becomes. makes: what a command that does not
    resume has made by then: removed before it runs again. seconds: predicted, on two CPU cores. alone: it
    measures time, and so has the machine to itself.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    prints: str | None = None
    makes: str | None = None
    seconds: float = 10.0
    alone: bool = False


class Ended(Record):
    """The note of a step that has ended."""

    words: list[str]
    seconds: float


class Workspace:
    """The folder of a reproduction: data, runs, tables, scores, and a note per ended step."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """threads: of each command, unless the environment says otherwise; None: torch's own number."""
        self.path = path.absolute()
        self.environment = dict(os.environ)
        self._running, self._ends = set[subprocess.Popen[bytes]](), False
        if threads is not None:
            self.environment.setdefault("OMP_NUM_THREADS", str(threads))

    def note(self, step: Step) -> Path:
        """The file that says that a step has ended."""
        return self.path / "steps" / f"{step.name}.json"

    def ended(self, step: Step) -> Ended | None:
        """How a step has ended; None if it has not. UserError where it was another command."""
        note = self.note(step)
        if not note.exists():
            return None
        ended = record_of(Ended, read_json(note, FIX), note, FIX)
        if ended.words != list(step.words):
            raise UserError(
                f"{note} is of another command (mlm-train {shlex.join(ended.words)}): name another --output, "
                f"or remove the file and what that command made"
            )
        return ended

    def run(self, step: Step) -> float:
        """Run a step to its end. Returns the seconds. UserError where it fails."""
        started = time.monotonic()
        if step.makes is not None:
            shutil.rmtree(self.path / step.makes, ignore_errors=True)
        log = self.path / "logs" / f"{step.name}.log"
        for folder in ("logs", "results", "steps"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlm_train", *step.words]
        with log.open("ab") as errors:
            process = subprocess.Popen(
                command,
                cwd=self.path,
                env=None if step.alone else self.environment,
                stdout=subprocess.PIPE if step.prints else errors,
                stderr=errors,
                preexec_fn=_end_at_once,
            )
            self._running.add(process)
            if self._ends:
                process.terminate()
            printed, _ = process.communicate()
            self._running.remove(process)
        if process.returncode:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise UserError(
                f"{step.name} failed ({lines[-1][:300] if lines else process.returncode}): see {log}"
            )
        if step.prints:
            write_text(self.path / step.prints, printed.decode())
        seconds = time.monotonic() - started
        write_json(self.note(step), {"words": list(step.words), "seconds": seconds})
        return seconds

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Have a signal that ends the body end what runs, too: a training writes a checkpoint first."""
        try:
            yield
        except KeyboardInterrupt:
            self._ends = True
            for process in list(self._running):
                process.terminate()
            raise

    def result(self, file: str) -> object:
        """The JSON that a step wrote: of several lines the last."""
        text = (self.path / file).read_text(encoding="utf-8")
        return json.loads(text if text.lstrip().startswith("{\n") else text.strip().splitlines()[-1])


def _end_at_once() -> None:
    """Have the command end with the process that started it: the same step may soon run again."""
    end_with_parent(signal.SIGKILL)


def needed(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps of these names and all that they need, in the order of `steps`."""
    by_name, wanted = {step.name: step for step in steps}, set[str]()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting.extend(by_name[name].needs)
    return [step for step in steps if step.name in wanted]


def run_all(workspace: Workspace, steps: Sequence[Step], say: Callable[[str], None], jobs: int = 1) -> None:
    """Run what has not ended, `jobs` steps at once, each after those that it needs.

    Says before each one what it is, and how long all will take. UserError where one fails, once those that
    run beside it have ended. A signal that ends this process ends them first.
    """
    done = {step.name for step in steps if workspace.ended(step) is not None}
    left = [step for step in steps if step.name not in done]
    running = dict[Future[float], Step]()
    started, predicted = time.monotonic(), 0.0
    with ThreadPoolExecutor(jobs) as pool, workspace.ending():
        while left or running:
            for step in [step for step in left if done.issuperset(step.needs)]:
                if running and (step.alone or any(other.alone for other in running.values())):
                    continue
                if len(running) == jobs:
                    break
                left.remove(step)
                running[pool.submit(workspace.run, step)] = step
                rest = sum(each.seconds for each in (*left, *running.values())) / jobs
                if predicted > MEASURED:  # by the speed of this machine, once that is known
                    rest *= (time.monotonic() - started) / (predicted / jobs)
                number = len(steps) - len(left)
                say(f"[{number}/{len(steps)}] {step.name}; about {in_time(rest)} left")
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                ended.result()
                step = running.pop(ended)
                done.add(step.name)
                predicted += step.seconds


def in_time(seconds: float) -> str:
    """Such as 2 h 05 min, 3 min or 40 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
