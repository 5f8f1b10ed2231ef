"""Train a small model while faults are injected into its processes, disk and checkpoints at random moments.

usage: .venv/bin/python tools/chaos.py [--events 50] [--seed 1] [--json FILE]

The run is restarted after each death with the same command, in another parallel layout. At the end its
losses and weights are compared with those of an undisturbed run. Any difference, and any loss of a committed
checkpoint, gives one line and exit code 1. Needs root: the run's folder is a small tmpfs.

examples:
  .venv/bin/python tools/chaos.py
  .venv/bin/python tools/chaos.py --events 9 --layouts dp2          one layout: bitwise equal
  .venv/bin/python tools/chaos.py --kinds disk-full,read-only --events 8 --seed 7
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from injuries import ASIDE, DEADLY, INJURIES, NOT_SAVED, PATIENCE, ROOT, Disk, Event, Life, Violation, whole
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(ROOT))
GAP = 16  # approximate steps between injuries: a failed save and the next successful one take 8
TMPFS_MEGABYTES = 24
MODEL = (
    "model.vocab_size=512", "model.hidden_size=32", "model.num_hidden_layers=4", "model.intermediate_size=64",
    "model.max_position_embeddings=64", "data.sequence_length=32", "memory.mode=unique", "optimizer.lr=1e-3",
    "schedule.warmup_steps=2", "schedule.min_lr=0", "train.precision=fp32", "train.global_batch_size=8",
    "train.micro_batch_size=1", "train.eval_interval=0", "train.eval_samples=16", "checkpoint.interval=4",
    "checkpoint.keep_latest_k=4", "monitor.peak_tflops=1", "train.watchdog_timeout=15",
)  # fmt: skip
LAYOUTS = {  # name: processes, overrides
    "dp2": (2, ("parallel.zero_stage=1",)),
    "pp2": (2, ("parallel.pipeline=2",)),
    "tp2": (2, ("parallel.tensor=2",)),
    "dp2-zero3": (2, ("parallel.zero_stage=3",)),
    "pp2-dp2": (4, ("parallel.pipeline=2", "parallel.zero_stage=1")),
    "one": (1, ()),
}
LAYOUTS_USED = "dp2,pp2,tp2,dp2-zero3"
TOLERANCE = 1e-4  # where layouts change: rounding differences, accumulated over hundreds of steps
console = Console(stderr=True, highlight=False, soft_wrap=True)


class Chaos:
    """A run, its planned injuries, and the results."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder, self.chance = folder, random.Random(args.seed)
        self.layouts = args.layouts
        self.events = plan(args.events, args.kinds, self.chance)
        self.steps = (args.events + 5) * GAP
        self.data = args.data or self._prepared()
        self.lives: list[Life] = []
        self.at = 0  # the run's current step
        self.repeated = self.not_saved = self.for_thread = 0
        self.recovering: list[Event] = []  # deaths after which no step was trained yet

    def _prepared(self) -> Path:
        """Prepare Python's standard library as data, with a tokenizer of 512 tokens."""
        text, data = self.folder / "text", self.folder / "data"
        commands = (
            ("data", "collect", "--output", text, "--max-bytes", "1MB", "--validation-fraction", "0.1"),
            ("data", "prepare", "--input", text, "--output", data, "--tokenizer", "train:512"),
        )
        for number, words in enumerate(commands):
            life = Life(0, mlm_train(*words), self.folder / f"prepare-{number}.log")
            life.ended()
            if life.process.returncode:
                raise Violation(f"the data could not be prepared: {life.output}")
        return data

    def start(self, output: Path, layout: str) -> Life:
        """Launch the run in folder `output`."""
        processes, overrides = LAYOUTS[layout]
        words = (*MODEL, f"data.path={self.data}", f"train.steps={self.steps}", f"train.output={output}")
        command = mlm_train("launch", "--nproc", processes, "configs/micro.yaml", *words, *overrides)
        number = len(self.lives)
        life = Life(number, command, self.folder / f"{output.name}-{number:02}.log")
        self.lives.append(life)
        return life

    def unbroken(self) -> Path:
        """Run the same training undisturbed. Returns its folder."""
        output = self.folder / "unbroken"
        life = self.start(output, self.layouts[0])
        life.ended(PATIENCE + 5 * self.steps)
        if life.process.returncode:
            raise Violation(f"the undisturbed run failed: {life.output}")
        return output

    def run(self, disk: Disk, bar: Progress) -> None:
        """Launch again and again, until the last step is trained."""
        task = bar.add_task("injuries", total=len(self.events))
        waiting = list(self.events)
        while True:
            expected = self._newest(disk)
            layout = self.chance.choice(self.layouts)
            life = self.start(disk.run, layout)
            try:
                allowed = self._live(life, disk, waiting, lambda: bar.advance(task))
            finally:
                life.kill()
            self._judge(life, disk, expected, allowed)
            if life.process.returncode == 0:
                break
        if waiting:
            raise Violation(f"the run was over before {len(waiting)} of {len(self.events)} injuries")

    def _newest(self, disk: Disk) -> int:
        """The step of the newest committed and undamaged checkpoint."""
        folders = whole(disk.checkpoints)
        return int(folders[-1].name.removeprefix("step-")) if folders else 0

    def _live(self, life: Life, disk: Disk, waiting: list[Event], done: Any) -> set[int]:
        """Inject the due injuries until the launch ends. Returns the exit codes that they allow."""
        while life.alive():
            self._recovered(life)
            time.sleep(0.01)
            if not waiting or not self._due(waiting[0], life):
                continue
            life.until(lambda: False, waiting[0].delay * (1 if waiting[0].early else life.pace()))
            if not life.alive():
                break
            event = waiting.pop(0)
            event.life, event.at_step, event.when = life.number, life.step or self.at, time.monotonic()
            allowed = INJURIES[event.kind](event, life, disk)
            done()
            if not life.alive():
                event.death = life.process.returncode
                self.recovering.append(event)
                self._tell(event)
                return allowed
            if event.kind not in DEADLY:
                event.seconds = time.monotonic() - event.when
            self._tell(event)
        self._recovered(life)
        return {0}

    def _due(self, event: Event, life: Life) -> bool:
        return life.step >= event.step or (event.early and bool(self.recovering))

    def _recovered(self, life: Life) -> None:
        if life.step:
            for event in self.recovering:
                event.seconds = time.monotonic() - event.when
            self.recovering.clear()

    def _tell(self, event: Event) -> None:
        what = "it continued" if event.death is None else f"exit code {event.death}"
        console.print(
            f"life {event.life}, step {event.at_step}: {event.kind} {event.note} | {what}", style="dim"
        )

    def _judge(self, life: Life, disk: Disk, expected: int, allowed: set[int]) -> None:
        """Check that nothing committed is lost, nothing damaged is used, and the exit code is as expected."""
        if life.start is not None:
            if life.start != expected:
                raise Violation(
                    f"life {life.number} resumed at step {life.start}; the newest whole checkpoint was of "
                    f"step {expected}: {life.output}"
                )
            self.repeated += self.at - life.start
            self.at = max(life.start, life.step)
        self.not_saved += life.count(NOT_SAVED)
        self.for_thread += life.count(ASIDE)
        if life.process.returncode not in allowed | {0}:
            last = next((line for line in reversed(life.lines) if line.strip()), "")
            raise Violation(
                f"life {life.number} ended with exit code {life.process.returncode} instead of "
                f"{sorted(allowed)}: {last} | {life.output}"
            )
        for folder in disk.checkpoints.glob("damaged-*"):  # the run has reported it
            shutil.rmtree(folder)

    def compare(self, run: Path, other: Path) -> dict[str, Any]:
        """Compare the losses of all steps, the final weights and the optimizer. Raises Violation."""
        one_layout = len(self.layouts) == 1
        tolerance = 0.0 if one_layout else TOLERANCE
        worst: dict[str, float] = {}
        for tag in ("train/loss", "train/tokens", "validation/loss"):
            found, expected = scalars(run, tag), scalars(other, tag)
            if found.keys() != expected.keys():
                differing = sorted(found.keys() ^ expected.keys())
                raise Violation(f"{tag}: steps {differing[:9]} are in only one of the two runs")
            worst[tag] = max(abs(found[step] - value) / abs(value) for step, value in expected.items())
        last = f"checkpoints/step-{self.steps:08}"
        worst["final weights"] = difference(run / last, other / last, self.folder)
        for name, value in worst.items():
            if value > tolerance:
                raise Violation(f"{name} differs from the undisturbed run by {value:.2g}, relative")
        if one_layout and checksums(run / last) != checksums(other / last):
            raise Violation("the last checkpoint is not bitwise equal to that of the undisturbed run")
        return {"bits equal": one_layout, "largest relative difference": worst}

    def figures(self) -> dict[str, Any]:
        """The cost of the injuries."""
        by_kind: dict[str, dict[str, Any]] = {}
        for kind in dict.fromkeys(event.kind for event in self.events):
            events = [event for event in self.events if event.kind == kind]
            seconds = {
                name: sorted(event.seconds for event in events if died(event) and event.seconds is not None)
                for name, died in (
                    ("seconds until training again", lambda event: event.death is not None),
                    ("seconds until saved again", lambda event: event.death is None),
                )
            }
            deaths = sum(event.death is not None for event in events)
            by_kind[kind] = {"events": len(events), "deaths": deaths} | {
                name: round(values[len(values) // 2], 1) if values else None
                for name, values in seconds.items()
            }
        return {
            "events": len(self.events),
            "launches": len(self.lives) - 1,
            "steps": self.steps,
            "steps repeated": self.repeated,
            "saves failed and said": self.not_saved,
            "damaged checkpoints set aside": self.for_thread,
            "by kind (medians)": by_kind,
        }


def plan(count: int, kinds: Sequence[str], chance: random.Random) -> list[Event]:
    """Events of all kinds, equally often and in random order."""
    order = [kinds[number % len(kinds)] for number in range(count)]
    chance.shuffle(order)
    starts = [kind in DEADLY[:2] and chance.random() < 0.3 for kind in order]
    return [
        Event(
            kind,
            step=(number + 1) * GAP + chance.randrange(-GAP // 2, GAP // 2),
            delay=chance.random() * (15 if early else 2),
            early=early,
            strike=chance.random() < (0.6 if kind in ("truncate", "flip-bits", "remove") else 0.2),
            chance=random.Random(chance.random()),
        )
        for number, (kind, early) in enumerate(zip(order, starts, strict=True))
    ]


def mlm_train(*words: object) -> list[str]:
    """A command line of mlm-train."""
    return [sys.executable, "-m", "mlm_train", *map(str, words)]


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Step -> value of a TensorBoard tag. Violation where a step occurs twice."""
    import logging

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Scalars(tag)
    twice = [step for step, times in Counter(event.step for event in found).items() if times > 1]
    if twice:
        raise Violation(f"{tag}: steps {twice[:9]} occur twice")
    return {event.step: event.value for event in found}


def checksums(checkpoint: Path) -> list[str]:
    """Checksums of a checkpoint's files."""
    return [entry["sha256"] for entry in json.loads((checkpoint / "manifest.json").read_text())["files"]]


def difference(checkpoint: Path, other: Path, folder: Path) -> float:
    """||a - b|| / ||b|| over all weights of two checkpoints, which are verified."""
    import torch
    from safetensors.torch import load_file

    from mlm_train.checkpoint.export import export_checkpoint
    from mlm_train.utils.library_noise import hush_libraries

    hush_libraries()
    exports = []
    for number, source in enumerate((checkpoint, other)):
        target = folder / f"export-{number}"
        export_checkpoint(source, target, "float32")
        tensors = load_file(target / "model.safetensors")
        exports.append(torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double())
    return float((exports[0] - exports[1]).norm() / exports[1].norm())


def show(figures: dict[str, Any], comparison: dict[str, Any]) -> None:
    """Print the result."""
    table = Table("injury", box=box.SIMPLE, title="chaos: results", title_justify="left")
    rows = figures["by kind (medians)"]
    for name in next(iter(rows.values())):
        table.add_column(name, justify="right")
    for kind, row in rows.items():
        table.add_row(kind, *("-" if value is None else str(value) for value in row.values()))
    out = Console()
    out.print(table)
    for name, value in figures.items():
        if not isinstance(value, dict):
            out.print(f"{name}: {value}", highlight=False)
    for name, value in comparison["largest relative difference"].items():
        out.print(f"{name} compared with the undisturbed run: {value:.2g}", highlight=False)
    out.print(f"bitwise equal: {'yes' if comparison['bits equal'] else 'not required, layouts changed'}")


def arguments() -> argparse.Namespace:
    """The parsed options; kinds and layouts as tuples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=50, help="number of injuries (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default 1)")
    parser.add_argument("--kinds", default=",".join(INJURIES), help=f"default: {','.join(INJURIES)}")
    parser.add_argument("--layouts", default=LAYOUTS_USED, help=f"of {','.join(LAYOUTS)}; the default is "
                        f"{LAYOUTS_USED}; with only one the result must be bitwise equal")  # fmt: skip
    parser.add_argument("--data", type=Path, help="folder of `data prepare`, at most 512 ids")
    parser.add_argument(
        "--folder", type=Path, help="new working folder, which is kept (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every event")
    args = parser.parse_args()
    for name, known in (("kinds", INJURIES), ("layouts", LAYOUTS)):
        chosen = tuple(getattr(args, name).split(","))
        if unknown := [word for word in chosen if word not in known]:
            parser.error(f"--{name} {unknown[0]}: choose from {', '.join(known)}")
        setattr(args, name, chosen)
    if args.events < 1:
        parser.error(f"--events {args.events}: give at least 1")
    if args.folder is not None and args.folder.exists():
        parser.error(f"--folder {args.folder} exists: name a new one")
    if os.geteuid() != 0:
        parser.error("needs root to mount a small tmpfs that it fills and makes read-only")
    return args


def main() -> int:
    """Returns 0, or 1 where the run violated a guarantee."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unmount first
    folder = Path(tempfile.mkdtemp(prefix="chaos-")) if args.folder is None else args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack:
        try:
            disk = Disk(folder / "disk", TMPFS_MEGABYTES)
        except OSError as error:
            print(f"chaos: a tmpfs cannot be mounted here: {error}", file=sys.stderr)
            return 2
        stack.callback(disk.unmount)
        bar = stack.enter_context(Progress(*columns, console=console))
        try:
            chaos = Chaos(args, folder)
            unbroken = chaos.unbroken()
            chaos.run(disk, bar)
            comparison = chaos.compare(disk.run, unbroken)
        except Violation as violation:
            shutil.copytree(disk.run, folder / "evidence", dirs_exist_ok=True)
            print(f"chaos: {violation} | kept: {folder}", file=sys.stderr)
            return 1
    minutes = round((time.monotonic() - started) / 60, 1)
    figures = chaos.figures() | {"minutes": minutes}
    show(figures, comparison)
    if args.json:
        found = {"command": " ".join(sys.argv), "seed": args.seed, "layouts": args.layouts}
        found |= {"figures": figures, "comparison": comparison}
        found["what happened"] = [event.report() for event in chaos.events]
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
