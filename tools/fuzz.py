"""Damage files of every kind, let the real readers read them, and check for forbidden outcomes.

usage: .venv/bin/python tools/fuzz.py [--cases 30000] [--seed 1] [--readers NAMES] [--folder DIR]

A case takes a small artefact (config, overrides, prepared data, checkpoint, export, Llama, table, unfinished
build, tokenizers, text, notes) and damages one of its files at random: bits, lengths, JSON and YAML parts of
another type or size, missing or new; a FIFO, a folder, a link or a sparse terabyte instead of the file. Where
the file has its own checksum, that is recomputed in half of the cases. The real reader then reads it in a
process of its own. Bad outcomes are

  traceback   an exception instead of a line for the user, or more than one line
  code        an exit code other than 0, 2 or 130
  time        more than 10 s, or a process that died, twice
  result      accepted with another result, although a checksum covers the file and was not recomputed

The results of a changed plain config, tokenizer or text are not compared, since these are valid inputs.
tools/fuzz_readers.py defines each reader's result. Every case follows from the seed and its number alone.
Exit code 1 where there was a bad one; --folder keeps them.

examples:
  .venv/bin/python tools/fuzz.py --cases 500
  .venv/bin/python tools/fuzz.py --readers config,overrides --cases 5000 --seed 7
  .venv/bin/python tools/fuzz.py --case 1234 --seed 7               one case again, with its full output
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fuzz_pool import KINDS, Outcome, outcomes
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
LINE_EVERY = 2000  # cases, in a log
console = Console(stderr=True, highlight=False, soft_wrap=True)


def show(found: Counter[tuple[str, str]], names: list[str]) -> None:
    """Print the result."""
    table = Table("reader", box=box.SIMPLE, title="fuzz: damaged files read", title_justify="left")
    columns = ("cases", "accepted", "refused", *KINDS)
    for column in columns:
        table.add_column(column, justify="right")
    for name in [*names, "all"]:
        rows = [key for key in found if name in (key[0], "all")]
        counts = {kind: sum(found[key] for key in rows if key[1] == kind) for kind in columns[1:]}
        table.add_row(name, f"{sum(counts.values()):,}", *(f"{count:,}" for count in counts.values()))
    Console(width=110).print(table)


def arguments() -> argparse.Namespace:
    """The parsed options."""
    from fuzz_readers import READERS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, default=30_000, help="number of cases (default 30000, which takes minutes)"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed (default 1)")
    parser.add_argument("--case", type=int, metavar="N", help="run only this case, and show its output")
    parser.add_argument("--readers", default=",".join(READERS), help=f"default: all of {', '.join(READERS)}")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--folder", type=Path, help="keep bad cases in subfolders of this folder, by number")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and every bad case")
    args = parser.parse_args()
    # Names contain commas too: known names are removed from the front one by one.
    args.names, rest = [], args.readers
    while rest:
        known = [name for name in READERS if rest == name or rest.startswith(f"{name},")]
        if not known:
            parser.error(f"--readers {rest}: choose from {', '.join(READERS)}")
        args.names.append(max(known, key=len))
        rest = rest[len(args.names[-1]) + 1 :]
    if args.cases < 1 or args.processes < 1:
        parser.error("--cases and --processes: give at least 1")
    return args


def main() -> int:
    """Returns 0, or 1 where an outcome was bad."""
    args = arguments()
    os.chdir(ROOT)
    import torch
    from fuzz_cases import Fuzz

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
        # Without a refresh thread, whose locks a forked process would inherit.
        with Progress(*columns, console=console, auto_refresh=False) as bar:
            task = bar.add_task("cases", total=args.cases)
            for outcome in outcomes(fuzz, args.cases, args.processes):
                found[outcome.reader, outcome.kind] += 1
                if outcome.kind in KINDS:
                    bad.append(outcome)
                    last = (outcome.said.strip().splitlines() or [""])[-1][:300]
                    line = f"case {outcome.number}: {outcome.reader}: {outcome.what}: {outcome.kind}: {last}"
                    console.print(line, markup=False)
                    if args.folder is not None:
                        fuzz.keep(outcome, args.folder / f"{outcome.number:06}")
                done = sum(found.values())
                bar.update(task, advance=1, refresh=not done % 50)
                if not console.is_terminal and done % LINE_EVERY == 0:
                    left = (time.monotonic() - started) / done * (args.cases - done)
                    console.print(f"{done:,} of {args.cases:,} cases, {len(bad)} bad, {left:.0f} s left")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    show(found, args.names)
    minutes = (time.monotonic() - started) / 60
    print(f"{args.cases:,} cases, seed {args.seed}: {len(bad)} bad, {minutes:.1f} minutes")
    if args.json:
        kinds = sorted({kind for _, kind in found})
        counts = {name: {kind: found[name, kind] for kind in kinds} for name in args.names}
        tree = {"seed": args.seed, "cases": args.cases, "minutes": round(minutes, 1), "readers": counts}
        args.json.write_text(json.dumps(tree | {"bad": [one._asdict() for one in bad]}, indent=1) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
