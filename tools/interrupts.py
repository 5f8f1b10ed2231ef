"""Send Ctrl-C and SIGTERM at random moments to the commands that write something.

usage: .venv/bin/python tools/interrupts.py [--moments 100] [--seed 1] [--json FILE]

Each command runs undisturbed first, for its duration and result. Then it is started again and again and gets
a signal at a random moment of that duration: SIGINT or SIGTERM, to all of its processes, as from a terminal,
or to the first one. Bad are

- an exit code other than 130 (143), or 0 where all was done; other than one line; a traceback;
- a process that lives a second longer, or a command that does not end;
- leftovers that the same command, run again, does not remove; a result with other bytes.

Each bad case gives a line, and the exit code is then 1. A signal before the program's first line is handled
by Python itself: such cases are counted separately and another moment is drawn.

examples:
  .venv/bin/python tools/interrupts.py
  .venv/bin/python tools/interrupts.py --commands build,compress --moments 20 --seed 7
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MARK = "MLM_INTERRUPTS"  # in the environment of every process of a case
PATIENCE = 120.0  # seconds to wait for a command's end
LATER = 1.0  # seconds after a command's end within which its processes must be gone
RESULT = "result"  # name of every command's output
SCRATCH = "tmp/mlm-ray-*/ray/session_*_{pid}"  # Ray's files below /, where process `pid` started it
BARS = "━╸╺"  # characters of progress bars
SIGNALS = tuple((number, all_of_them) for number in ("SIGINT", "SIGTERM") for all_of_them in (True, False))
MODEL = (
    "model.vocab_size=512", "model.hidden_size=128", "model.num_hidden_layers=4",
    "model.intermediate_size=1024", "model.max_position_embeddings=64", "data.sequence_length=32",
    "train.precision=fp32",
    "train.global_batch_size=2", "train.micro_batch_size=2", "train.steps=1", "train.eval_interval=0",
    "schedule.warmup_steps=0", "monitor.peak_tflops=1",
)  # fmt: skip
console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass
class Case:
    """A signal and its outcome."""

    command: str
    number: str
    everyone: bool  # sent to all processes of the command
    at: float  # seconds after its start
    code: int | None = None
    seconds: float = 0.0  # from the signal to the end
    heard: bool = True  # came after the program's first line
    left: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        who = "all processes" if self.everyone else "the first process"
        return f"{self.command}: {self.number} to {who} after {self.at:.3f} s: {'; '.join(self.bad)}"


class Running:
    """A command in a session of its own."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        environment = os.environ | {
            "PYTHONFAULTHANDLER": "1",
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
            "TMPDIR": str(log.parent / "tmp"),
        }
        # A shell starts background processes with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def listens(self) -> bool:
        """Whether the program's first line was reached: Python itself has no SIGTERM handler."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
        return False

    def processes(self) -> list[psutil.Process]:
        """All processes of the command, also detached ones."""
        processes = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
            except psutil.Error:
                continue
        return processes

    def send(self, number: int, everyone: bool) -> None:
        (os.killpg if everyone else os.kill)(self.process.pid, number)

    def ended(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def scratch(self) -> list[str]:
        """Files of Ray left behind."""
        return [str(path) for path in Path("/").glob(SCRATCH.format(pid=self.process.pid))]

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Interrupts:
    """A command, its undisturbed result, and all of its cases."""

    def __init__(self, name: str, words: list[str], folder: Path) -> None:
        self.name, self.folder = name, folder / name
        self.output = self.folder / "out" / RESULT
        self.words = [*words, "--output", str(self.output)]
        self.count = 0
        for path in (self.output.parent, self.folder / "tmp"):
            path.mkdir(parents=True)
        self.usual = set[str]()  # leftovers of libraries in the temporary folder
        self.seconds = self._undisturbed()
        self.expected = contents(self.output)
        self._clear()

    def cases(self, chance: random.Random) -> Iterator[Case]:
        """Cases until one comes between the program's first line and its end."""
        while True:
            number, everyone = chance.choice(SIGNALS)
            case = Case(self.name, number, everyone, chance.uniform(0, self.seconds))
            if self._try(case, chance):
                yield case
                if case.heard:
                    return

    def _start(self) -> Running:
        self.count += 1
        return Running(self.words, self.folder / f"{self.count:03}.log")

    def _undisturbed(self) -> float:
        self._clear()
        started = time.monotonic()
        running = self._start()
        if not running.ended(PATIENCE) or running.process.returncode:
            raise SystemExit(f"interrupts: {self.name} does not work: {running.text()[-2000:]}")
        seconds = time.monotonic() - started
        self.usual |= {path.name for path in (self.folder / "tmp").iterdir()}
        return seconds

    def _temporary(self) -> list[str]:
        """Temporary files left by a stopped command only."""
        return [path.name for path in (self.folder / "tmp").iterdir() if path.name not in self.usual]

    def _try(self, case: Case, chance: random.Random) -> bool:
        """Run a case. Returns whether the signal came before the end."""
        running = self._start()
        if running.ended(case.at):
            self._clear()
            return False
        case.heard, started = running.listens(), time.monotonic()
        running.send(signal.Signals[case.number], case.everyone)
        if not running.ended(PATIENCE):
            running.send(signal.SIGABRT, everyone=False)  # faulthandler writes all threads' stacks
            running.ended(LATER)
            case.bad.append(f"it did not end in {PATIENCE:.0f} s; where it was: {running.log}")
        case.seconds, case.code = time.monotonic() - started, running.process.returncode
        case.heard |= case.code == 0  # it came during Python's exit, when all was done
        time.sleep(LATER)
        if alive := running.processes():
            names = Counter(" ".join(process.cmdline())[:60] for process in alive)
            case.bad.append(f"still running: {dict(names)}")
            for process in alive:
                process.kill()
        if not case.heard:
            self._clear()
            return True
        self._judge(case, running)
        case.left += [*running.scratch(), *self._temporary()]
        self._check_leftovers(case, running, chance)
        if case.bad:
            case.bad.append(f"see {running.log}")
        return True

    def _judge(self, case: Case, running: Running) -> None:
        """Check exit code and output."""
        number, text = signal.Signals[case.number], running.text()
        if case.code not in (0, 128 + number):
            case.bad.append(f"exit code {case.code}")
        lines = [line for line in text.splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("mlm-train: ")]
        if len(ours) != (case.code != 0) or (ours and lines[-1] != ours[0]):
            case.bad.append(f"{len(ours)} lines, the last one: {lines[-1] if lines else None!r}")
        others = [line for line in lines if line not in ours and not set(line) & set(BARS)]
        if others and case.code:
            case.bad.append(f"it also prints {others[:3]}")

    def _check_leftovers(self, case: Case, before: Running, chance: random.Random) -> None:
        """Check the output: nothing, the whole result, or leftovers that a rerun clears or resumes."""
        others = [path.name for path in self.output.parent.iterdir() if path.name != RESULT]
        if self.output.is_dir():
            others += [path.name for path in self.output.iterdir() if is_draft(path.name)]
        case.left += others
        whole = contents(self.output) == self.expected
        if case.code == 0 and not whole:
            case.bad.append("exit code 0 without a whole result")
        if whole:
            self._clear()
        elif case.left or (self.output.exists() and chance.random() < 0.2):
            running = self._start()
            if not running.ended(PATIENCE) or running.process.returncode:
                case.bad.append(f"the same command fails afterwards: {running.text()[-300:]}")
            elif contents(self.output) != self.expected:
                case.bad.append("the same command gives another result afterwards")
            leftovers = [path.name for path in self.output.parent.iterdir() if path.name != RESULT]
            leftovers += [*before.scratch(), *running.scratch(), *self._temporary()]
            if leftovers:
                case.bad.append(f"never removed: {leftovers}")
            self._clear()

    def _clear(self) -> None:
        for folder in (self.output.parent, self.folder / "tmp"):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_draft(name: str) -> bool:
    """Whether a file still has its temporary name."""
    return name.endswith((".part", ".writing")) or name.startswith("shard-")


def contents(folder: Path) -> dict[str, Any] | None:
    """Bytes of every file; a table's index without its time and the digest that covers it."""
    if not folder.is_dir():
        return None
    files: dict[str, Any] = {}
    for path in folder.iterdir():
        files[path.name] = path.read_bytes()
        if path.name == "tol.index.json":
            index = json.loads(files[path.name])
            index["source"].pop("created")
            files[path.name] = {name: value for name, value in index.items() if name != "digest"}
    return files


def prepared(folder: Path) -> dict[str, list[str]]:
    """Make text, a model and a table. Returns the commands that read them."""
    text, data, run, model, table = (folder / name for name in ("text", "data", "run", "model", "table"))
    for words in (
        ("data", "collect", "--output", text, "--max-bytes", "2MB"),
        ("data", "prepare", "--input", text, "--output", data, "--tokenizer", "train:512", "--workers", 1),
        ("pretrain", ROOT / "configs/micro.yaml", *MODEL, f"data.path={data}", f"train.output={run}"),
        ("export", run, "--output", model),
        ("tol", "build", model, "--output", table, "--dtype", "float32", "--partitions", 8),
    ):
        done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"interrupts: {words[0]} failed: {done.stderr[-2000:]}")
    cut = ("--dtype", "int8", "--group-size", 8, "--rank", 64)
    prepare = ("--tokenizer", "train:512", "--workers", 2)
    return {
        "export": command("export", run),
        "import": command("import", model),
        "prepare": command("data", "prepare", "--input", text, *prepare),
        "build": command("tol", "build", model, "--dtype", "int8", "--group-size", 8, "--partitions", 8),
        "compress": command("tol", "compress", table, *cut, "--partitions", 8),
    }


def command(*words: object) -> list[str]:
    """A command line of mlm-train."""
    return [sys.executable, "-m", "mlm_train", *map(str, words)]


def figures(cases: list[Case]) -> dict[str, Any]:
    """Figures of one command's cases."""
    heard = [case for case in cases if case.heard]
    seconds = [case.seconds for case in heard if case.code]
    early = Counter(case.code for case in cases if not case.heard)
    return {
        "moments": len(heard),
        "stopped": sum(case.code not in (0, None) for case in heard),
        "had finished": sum(case.code == 0 for case in heard),
        "bad": sum(bool(case.bad) for case in heard),
        "left, then cleared": sum(bool(case.left) and not case.bad for case in heard),
        "median s": round(statistics.median(seconds), 2) if seconds else None,
        "longest s": round(max(seconds), 2) if seconds else None,
        "before the first line": len(cases) - len(heard),
        "their exit codes": {str(code): count for code, count in early.items()},
    }


def arguments(known: tuple[str, ...]) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--moments", type=int, default=100, help="number of moments per command (default 100)"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed (default 1)")
    parser.add_argument("--commands", default=",".join(known), help=f"default: {','.join(known)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every case")
    args = parser.parse_args()
    args.commands = args.commands.split(",")
    if unknown := [name for name in args.commands if name not in known]:
        parser.error(f"--commands {unknown[0]}: choose from {', '.join(known)}")
    if args.moments < 1:
        parser.error(f"--moments {args.moments}: give at least 1")
    return args


def main() -> int:
    """Returns 0, or 1 where a case was bad."""
    args = arguments(("export", "import", "prepare", "build", "compress"))
    folder, chance = Path(tempfile.mkdtemp(prefix="interrupts-")), random.Random(args.seed)
    started, found = time.monotonic(), dict[str, list[Case]]()
    known = prepared(folder)
    commands = [Interrupts(name, known[name], folder) for name in args.commands]
    with contextlib.suppress(KeyboardInterrupt):  # report the cases so far
        for _ in track(range(args.moments), "moments", console=console, transient=True):
            for one in commands:
                for case in one.cases(chance):
                    found.setdefault(one.name, []).append(case)
                    if case.bad:
                        console.print(str(case))
    table = Table("command", box=box.SIMPLE)
    by_command = {name: figures(cases) for name, cases in found.items()}
    for column in next(iter(by_command.values())):
        table.add_column(column, justify="right")
    for name, row in by_command.items():
        table.add_row(name, *map(str, row.values()))
    Console(width=200).print(table)
    bad = [case for cases in found.values() for case in cases if case.bad]
    if args.json:
        tree = {
            "seed": args.seed,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "figures": by_command,
        }
        tree["cases"] = [vars(case) for cases in found.values() for case in cases]
        args.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    if bad:
        print(f"interrupts: {len(bad)} bad, the outputs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
