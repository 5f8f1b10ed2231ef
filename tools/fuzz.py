"""Damage files of every kind, have the real readers read them, and look for what must not happen.

usage: .venv/bin/python tools/fuzz.py [--cases 30000] [--seed 1] [--readers NAMES] [--folder DIR]

A case takes a small whole artefact (config, overrides, prepared data, checkpoint, export, Llama, table, unfinished
build, tokenizers, text, notes), damages one file of it by chance (bits, lengths, JSON and YAML parts of another type
or size, gone or new; a FIFO, a folder, a link, a sparse terabyte in its place; where the file has a checksum of
itself, that made again in half of the cases), and reads it in a process of its own. Bad is

  traceback   an exception that is no line for the user, or more lines than one
  code        an exit code other than 0, 2 or 130
  time        more than 10 s, twice, or a process that died
  result      accepted with another result, where a checksum covers the file and was not made again

A plain config, a tokenizer or a text that was changed is another one: there the result is not compared. Every case
follows from the seed and its number alone. Exit code 1 where there was a bad one; --folder keeps those.

examples:
  .venv/bin/python tools/fuzz.py --cases 500
  .venv/bin/python tools/fuzz.py --readers config,overrides --cases 5000 --seed 7
  .venv/bin/python tools/fuzz.py --case 1234 --seed 7               one case again, with all that it says
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}

import mutations  # noqa: E402 - once the paths are known
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table  # noqa: E402

LIMIT = 10.0  # seconds of a case
ROOM = 6 * 2**30  # bytes of memory that a process may take more
CASES_A_PROCESS = 250
KINDS = ("traceback", "code", "time", "result")
console = Console(stderr=True, highlight=False, soft_wrap=True)


class Outcome(NamedTuple):
    """What came of a case. kind: accepted, refused, or one of KINDS."""

    number: int
    reader: str
    what: str
    kind: str
    said: str = ""


class Fuzz:
    """The artefacts, the readers, and the undamaged results. Made before any process is forked."""

    def __init__(self, root: Path, seed: int, names: list[str]) -> None:
        from fuzz_readers import READERS

        self.root, self.seed = root, seed
        self.readers = {name: READERS[name] for name in names}
        self.order = [name for name in names for _ in range(READERS[name].share)]
        self.whole: dict[str, str | None] = {}

    def prepare(self) -> None:
        """Artefacts and undamaged results, by a process that ends: this one must have no threads to fork."""
        done = self.root / "results.json"
        child = multiprocessing.get_context("fork").Process(target=self._prepare, args=(done,))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"fuzz: the undamaged files could not be written or read: exit code {child.exitcode}")
        self.whole = json.loads(done.read_text())

    def _prepare(self, done: Path) -> None:
        from fuzz_readers import make_artefacts

        make_artefacts(self.root)
        for name, beside in (("data", "data-of-run"), ("plain-table", "table-to-compress")):
            shutil.copytree(self.root / name, self.root / beside)
        results = {}
        for name, reader in self.readers.items():
            with self.copied(name) as folder:
                outcome, results[name] = self._read(Outcome(-1, name, "whole", ""), folder)
                if outcome.kind != "accepted" and name not in ("allocation, by command", "report"):
                    raise SystemExit(f"fuzz: {reader.folder} is refused undamaged: {outcome.said}")
        done.write_text(json.dumps(results))

    @contextlib.contextmanager
    def copied(self, name: str) -> Iterator[Path]:
        """A copy of a reader's artefact, and what readers want beside it. Files are links until they change."""
        where = Path(tempfile.mkdtemp(dir=self.root, prefix="case-"))
        try:
            folder = self.readers[name].folder
            for beside in ("data-of-run", "table-to-compress"):
                (where / beside).symlink_to(self.root / beside)
            shutil.copytree(self.root / folder, where / folder, copy_function=os.link)
            yield where / folder
        finally:
            shutil.rmtree(where, ignore_errors=True)

    def run(self, number: int) -> Outcome:
        """A case, in this process."""
        chance = random.Random(f"{self.seed}/{number}")
        name = chance.choice(self.order)
        with self.copied(name) as folder:
            what, sealed = self.damage(name, folder, chance)
            outcome, result = self._read(Outcome(number, name, what, ""), folder)
        if outcome.kind == "accepted" and sealed and result != self.whole[name]:
            return outcome._replace(kind="result", said=f"{result} instead of {self.whole[name]}")
        return outcome

    def damage(self, name: str, folder: Path, chance: random.Random) -> tuple[str, bool]:
        """Damage one file: in words, and whether another result would be bad."""
        from fuzz_readers import reseal

        reader = self.readers[name]
        found = sorted({path for glob in reader.files for path in folder.glob(glob)})
        small = [path for path in found if path.suffix in (".json", ".yaml")]
        path = chance.choice(small if small and chance.random() < 0.4 else found)
        file = path.relative_to(folder)
        sealed = reader.sealed(folder, file)
        if name == "overrides":
            path.unlink()
            path.write_bytes(overrides(chance))
            return f"{file}", False
        if chance.random() < 0.1:
            return f"{file}: {mutations.replace_file(path, chance)}", sealed
        data = path.read_bytes()
        path.unlink()  # a link to the artefact's own
        how, resealed = "bytes", False
        if path.suffix in (".json", ".measured", ".attempt") and chance.random() < 0.8:
            how = "json"
            out, resealed = mutations.damage_json(data, chance, reseal(path))
        elif path.suffix == ".jsonl" and chance.random() < 0.7:
            lines = data.splitlines(keepends=True)
            at = chance.randrange(len(lines))
            how, lines[at] = "json line", mutations.damage_json(lines[at], chance, None)[0] + b"\n"
            out = b"".join(lines)
        elif path.suffix == ".safetensors" and chance.random() < 0.6:
            how, out = "header", mutations.damage_safetensors(data, chance)
        elif path.suffix == ".model" and chance.random() < 0.6:
            how, out = "model", mutations.damage_sentencepiece(data, chance)
        elif path.suffix == ".yaml" and chance.random() < 0.8:
            how, out = "yaml", mutations.damage_yaml(data.decode(), chance).encode("utf-8", "surrogatepass")
        else:
            out = mutations.damage_bytes(data, chance)
        path.write_bytes(out)
        return f"{file}: {how}{', resealed' if resealed else ''}", sealed and not resealed

    def _read(self, outcome: Outcome, folder: Path) -> tuple[Outcome, str | None]:
        from fuzz_readers import Refused

        from mlm_train.errors import UserError

        try:
            result = self.readers[outcome.reader].read(folder)
            return outcome._replace(kind="accepted"), result
        except Refused as error:
            lines = error.said.strip().splitlines()
            fine = lines and all(line.startswith(("mlm-train: ", "damaged: ")) and line.isprintable() for line in lines)
            one = len(lines) == 1 or all(line.startswith("damaged: ") for line in lines)
            kind = "code" if error.code not in (2, 130) else "refused" if fine and one else "traceback"
            return outcome._replace(kind=kind, said=error.said), None
        except (UserError, OSError) as error:  # of a part of a command, which says it by cli.main
            named = isinstance(error, UserError) or error.filename is not None
            said = "".join(traceback.format_exception(error))
            return outcome._replace(kind="refused" if named else "traceback", said=said), None
        except ValueError as error:
            expected = outcome.reader == "allocation" and type(error) is ValueError  # as its docstring says
            said = "".join(traceback.format_exception(error))
            return outcome._replace(kind="refused" if expected else "traceback", said=said), None
        except BaseException as error:
            return outcome._replace(kind="traceback", said="".join(traceback.format_exception(error))), None


def overrides(chance: random.Random) -> bytes:
    """One to three of them, NUL between: fields that are there or not, values of any kind."""
    from mlm_train.config import Config

    sections = [name for name in Config.model_fields if name != "context"]
    lines = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        section = chance.choice(sections)
        kind: Any = Config.model_fields[section].annotation
        fields = list(getattr(kind, "model_fields", {"mode": None}))
        value = chance.choice((*mutations.YAML_TEXTS, repr(chance.choice(mutations.WORDS[:8]))))
        line = f"{section}.{chance.choice(fields)}={value.replace(chr(0), '')}"
        lines.append(mutations.damage_text(line, chance).replace("\0", "") if chance.random() < 0.3 else line)
    return "\0".join(lines).encode("utf-8", "surrogateescape" if "\ud800" not in "".join(lines) else "replace")


class Worker:
    """A forked process that runs cases one after another."""

    def __init__(self, fuzz: Fuzz) -> None:
        self.end, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_serve, args=(fuzz, theirs, self.end), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.done, self.since = 0, 0.0

    def give(self, number: int) -> None:
        """Have it run a case."""
        self.number, self.since = number, time.monotonic()
        self.done += 1
        self.end.send(number)

    def kill(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.end.close()


def _serve(fuzz: Fuzz, end: Connection, other: Connection) -> None:
    other.close()
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # libraries write there
        os.dup2(null, descriptor)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    with contextlib.suppress(EOFError):
        while True:
            end.send(tuple(fuzz.run(end.recv())))


def outcomes(fuzz: Fuzz, cases: int, processes: int) -> Iterator[Outcome]:
    """Of all cases, as they end."""
    waiting = iter(range(cases))
    workers: list[Worker] = []
    late_once: set[int] = set()

    def feed(worker: Worker | None) -> None:
        if worker is not None and worker.done >= CASES_A_PROCESS:
            workers.remove(worker)
            worker.kill()
            worker = None
        if (number := next(waiting, None)) is None:
            if worker is not None:
                workers.remove(worker)
                worker.kill()
            return
        if worker is None:
            worker = Worker(fuzz)
            workers.append(worker)
        worker.give(number)

    for _ in range(min(processes, cases)):
        feed(None)
    while workers:
        ready = wait([worker.end for worker in workers], timeout=0.2)
        for worker in list(workers):
            assert worker.number is not None
            late = time.monotonic() - worker.since > LIMIT
            if worker.end in ready:
                try:
                    outcome = Outcome(*worker.end.recv())
                except EOFError:
                    worker.process.join()
                    outcome = fuzz_lost(fuzz, worker.number, f"the process died: exit code {worker.process.exitcode}")
                else:
                    yield outcome
                    feed(worker)
                    continue
            elif late and worker.number not in late_once:  # the machine may have been busy
                late_once.add(worker.number)
                workers.remove(worker)
                worker.kill()
                again = Worker(fuzz)
                workers.append(again)
                again.give(worker.number)
                continue
            elif late:
                outcome = fuzz_lost(fuzz, worker.number, f"no result in {LIMIT:.0f} s")
            else:
                continue
            workers.remove(worker)
            worker.kill()
            yield outcome
            feed(None)


def fuzz_lost(fuzz: Fuzz, number: int, said: str) -> Outcome:
    """A case that gave no result."""
    chance = random.Random(f"{fuzz.seed}/{number}")
    name = chance.choice(fuzz.order)
    with fuzz.copied(name) as folder:
        what, _ = fuzz.damage(name, folder, chance)
    return Outcome(number, name, what, "time", said)


def keep(fuzz: Fuzz, outcome: Outcome, folder: Path) -> None:
    """Leave a bad case for people: the damaged artefact, and what came of it."""
    target = folder / f"{outcome.number:06}"
    chance = random.Random(f"{fuzz.seed}/{outcome.number}")
    name = chance.choice(fuzz.order)
    with fuzz.copied(name) as copy:
        fuzz.damage(name, copy, chance)
        target.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, shutil.Error):  # what cannot be copied: a FIFO, /dev/zero
            regular = [path for path in copy.rglob("*") if path.is_file() and not path.is_symlink()]
            for path in regular:
                if path.stat().st_size < 2**30:
                    (target / path.relative_to(copy)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target / path.relative_to(copy))
    (target / "outcome.json").write_text(json.dumps(outcome._asdict() | {"seed": fuzz.seed}, indent=1) + "\n")


def show(found: Counter[tuple[str, str]], names: list[str]) -> None:
    """The closing table."""
    table = Table("reader", box=box.SIMPLE, title="fuzz: what the readers made of damaged files", title_justify="left")
    columns = ("cases", "accepted", "refused", *KINDS)
    for column in columns:
        table.add_column(column, justify="right")
    for name in [*names, "all"]:
        rows = [key for key in found if name in (key[0], "all")]
        counts = {kind: sum(found[key] for key in rows if key[1] == kind) for kind in columns[1:]}
        table.add_row(name, f"{sum(counts.values()):,}", *(f"{count:,}" for count in counts.values()))
    Console(width=110).print(table)


def arguments() -> argparse.Namespace:
    """What the user asks for."""
    from fuzz_readers import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=30_000, help="how many (default 30000: minutes)")
    parser.add_argument("--seed", type=int, default=1, help="of what is damaged how (default 1)")
    parser.add_argument("--case", type=int, metavar="N", help="run this one alone, and show what it says")
    parser.add_argument(
        "--readers", default=",".join(READERS), help=f"default: all, which are {', '.join(READERS)}"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--folder", type=Path, help="keep bad cases there, each in a folder by its number")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and every bad case")
    args = parser.parse_args()
    # Names hold commas too: those that are known are taken off the front, one after another.
    args.names, rest = [], args.readers
    while rest:
        known = [name for name in READERS if rest == name or rest.startswith(f"{name},")]
        if not known:
            parser.error(f"--readers {rest}: choose of {', '.join(READERS)}")
        args.names.append(max(known, key=len))
        rest = rest[len(args.names[-1]) + 1 :]
    if args.cases < 1 or args.processes < 1:
        parser.error("--cases and --processes: give at least 1")
    return args


def main() -> int:
    """0; 1 where a reader did what it must not."""
    args = arguments()
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    found: Counter[tuple[str, str]] = Counter()
    bad: list[Outcome] = []
    try:
        fuzz = Fuzz(root, args.seed, args.names)
        fuzz.prepare()
        if args.case is not None:
            outcome = fuzz.run(args.case)
            print(f"{outcome.reader}: {outcome.what}: {outcome.kind}\n{outcome.said}")
            return int(outcome.kind in KINDS)
        columns = (TextColumn("fuzz"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Without a thread that draws: a process that is forked meanwhile would inherit its locks.
        with Progress(*columns, console=console, auto_refresh=False) as bar:
            task = bar.add_task("cases", total=args.cases)
            for outcome in outcomes(fuzz, args.cases, args.processes):
                found[outcome.reader, outcome.kind] += 1
                if outcome.kind in KINDS:
                    bad.append(outcome)
                    last = (outcome.said.strip().splitlines() or [""])[-1][:300]
                    console.print(f"case {outcome.number}: {outcome.reader}: {outcome.what}: {outcome.kind}: {last}")
                    if args.folder is not None:
                        keep(fuzz, outcome, args.folder)
                bar.update(task, advance=1, refresh=not sum(found.values()) % 50)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    show(found, args.names)
    minutes = (time.monotonic() - started) / 60
    print(f"{args.cases:,} cases, seed {args.seed}: {len(bad)} bad, {minutes:.1f} minutes")
    if args.json:
        counts = {name: {kind: found[name, kind] for _, kind in found if found[name, kind]} for name in args.names}
        tree = {"seed": args.seed, "cases": args.cases, "minutes": round(minutes, 1), "readers": counts}
        args.json.write_text(json.dumps(tree | {"bad": [one._asdict() for one in bad]}, indent=1) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
