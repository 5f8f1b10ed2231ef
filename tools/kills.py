"""Kill ranks at random moments while they save checkpoints in the background, and look at what is left.

usage: .venv/bin/python tools/kills.py [--kills 200] [--seed 1] [--json FILE]

Two ranks save one checkpoint after another, all of whose numbers are its step, and get SIGKILL: both or one
of them, after a random time or before a random one of their changes to the disk. Then `latest` and the newest
checkpoint must be whole and nothing that was reported may be missing, a rank that was left must have ended by
itself, and the next two resume from the newest checkpoint, with its step in every number. Anything else gives
one line and exit code 1.
"""

import argparse
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mlm_train.checkpoint.folders import LATEST, newest, remove_partials, step_folder, step_folders
from mlm_train.checkpoint.keep import step_of
from mlm_train.checkpoint.load import load_training_state, open_checkpoint
from mlm_train.checkpoint.saver import Saver
from mlm_train.checkpoint.shards import RNG
from mlm_train.config import Config
from mlm_train.config.load import parse_config
from mlm_train.data.order import ORDER
from mlm_train.errors import UserError
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_engine, build_executor, build_model
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.optimizer_state import STATE, Restored, copy_state
from mlm_train.parallel.health.progress_marker import ProgressMarker
from mlm_train.train.preflight import newest_of
from mlm_train.train.resume import intact_checkpoint

WORLD = 2
PRELOADED = [module for module in sys.modules if module.startswith("mlm_train.")]
NAMED = 25  # checkpoints of its multiples are kept
PATIENCE = 60.0  # seconds for a rank to start, to save, and to end by itself
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open")  # audited, of which `open` writes too
PHASES = {  # of the thread's marker
    "copy": "copying",
    "space": "making the folder",
    "write": "writing and hashing",
    "commit": "manifest",
}
RENAMING, NAMING, PRUNING, BETWEEN = "renaming", "`latest`", "pruning", "between saves"


@dataclass(frozen=True)
class Kill:
    """When and whom. change: before which of the victim's changes to the disk; None: after `delay` s."""

    victims: Sequence[int]
    change: int | None
    delay: float

    @classmethod
    def drawn(cls, chance: random.Random) -> "Kill":
        """Half of them at a time, which finds long phases, half before a change, which finds short ones."""
        one, timed = chance.random() < 0.5, chance.random() < 0.5
        victims = [chance.randrange(WORLD)] if one else list(range(WORLD))
        return cls(victims, None if timed else chance.randrange(1, 90), chance.uniform(0, 0.5))


class Board:
    """What a rank has reached, in a file: what it wrote before it was killed is there."""

    SIZE = 256

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), self.SIZE)

    def write(self, phase: str, resumed: int, committed: int, changes: int) -> None:
        """Replace what it says."""
        text = json.dumps([phase, resumed, committed, changes]).encode()
        self.memory[: self.SIZE] = text.ljust(self.SIZE)  # one copy: a kill does not tear it

    def read(self) -> tuple[str, int, int, int]:
        """Phase, step resumed from (-1: not yet), last step reported, changes to the disk so far."""
        phase, resumed, committed, changes = json.loads(self.memory[: self.SIZE])
        return phase, resumed, committed, changes


class Rank:
    """A rank: it resumes, and saves until it is killed."""

    def __init__(
        self, rank: int, port: int, root: Path, board: Path, kill: Kill, pids: Sequence[Path]
    ) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
            "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        torch.set_num_threads(1)
        self.rank, self.root, self.kill, self.pids = rank, root, kill, pids
        self.board, self.phase = Board(board), "starting"
        self.resumed, self.committed, self.changes = -1, 0, 0

    def live(self) -> None:
        """Never returns but by an error."""
        config = config_of(self.root.parent)
        runtime = processes.start(config)
        model = build_model(config, runtime, 0)
        engine = build_engine(model, build_executor(model, config, runtime), config, runtime)
        found = intact_checkpoint(config, runtime, partial(newest_of, config))
        step = 0
        if found is not None:
            load_training_state(found.folder, found.manifest, engine, runtime)
            step = found.progress.step
            values = [part.tensor for part in copy_state(engine) if part.name != RNG]
            assert values and all((value == step).all() for value in values), f"not all numbers are {step}"
        runtime.broadcast(lambda: remove_partials(self.root))
        trained_on = {"fingerprint": "", "order": ORDER, "eod_id": 0, "bos_id": None}
        saver = Saver(engine, runtime, config, trained_on, self.on_commit, print)
        pid = str(os.getpid())
        self.pids[self.rank].write_text(pid)
        runtime.barrier()
        self.resumed = step
        self.watch()
        while True:
            step += 1
            self.at(BETWEEN)
            fill(engine, step)
            saver.save({"step": step, "samples": 0, "tokens": 0})
            fill(engine, -1)  # training goes on
            if (error := saver.settle()) is not None:
                raise error

    def on_commit(self, saved: Any) -> None:
        self.committed = step_of(saved.folder)

    def at(self, phase: str) -> None:
        self.phase = phase
        self.board.write(phase, self.resumed, self.committed, self.changes)

    def watch(self) -> None:
        """Note each phase, and kill before the chosen change."""
        at = ProgressMarker.at

        def noted(marker: ProgressMarker, phase: str, *more: Any) -> None:
            if phase in PHASES:
                self.at(PHASES[phase])
            at(marker, phase, *more)

        ProgressMarker.at = noted  # type: ignore[method-assign]
        sys.addaudithook(self.audit)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        if event == "open" and not (self.root.name in str(args[0]) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event == "os.rename":
            source, target = Path(os.fsdecode(args[0])).name, Path(os.fsdecode(args[1])).name
            if target.startswith("step-"):
                self.phase = RENAMING
            elif source.startswith("step-"):
                self.phase = PRUNING
            elif target == LATEST:
                self.phase = NAMING
        self.changes += 1
        self.at(self.phase)
        if self.changes == self.kill.change and self.rank == self.kill.victims[0]:
            for victim in reversed(self.kill.victims):  # itself last
                os.kill(int(self.pids[victim].read_text()), signal.SIGKILL)
            signal.pause()


def config_of(folder: Path) -> Config:
    """A model of 0.2 M parameters."""
    return parse_config(
        {
            "model": {
                "kind": "memory", "vocab_size": 997, "hidden_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64,
            },
            "data": {"path": "none", "sequence_length": 32},
            "parallel": {"engine": "fsdp", "timeout": PATIENCE},
            "memory": {"mode": "unique"},
            "schedule": {"warmup_steps": 2},
            "train": {"output": str(folder), "steps": 10**6, "global_batch_size": 2, "micro_batch_size": 1,
                      "device": "cpu"},
            "checkpoint": {"interval": 1, "keep_latest_k": 1, "keep_interval": NAMED},
        }
    )  # fmt: skip


def fill(engine: Engine, value: float) -> None:
    """Set all weights and moments."""
    restored = Restored(engine, STATE)
    for part in restored.slices:
        part.tensor.fill_(value)
    restored.finish()


def live(*arguments: Any) -> None:
    """A rank's process."""
    try:
        Rank(*arguments).live()
    except BaseException as error:
        sys.stderr.write(f"rank {arguments[0]}: {error}\n")
        sys.stderr.flush()
        os._exit(1)


class Violation(Exception):
    """What must not be."""


class Kills:
    """One life of the ranks after another, each ended by a kill."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.root, self.chance = folder / "run" / "checkpoints", chance
        self.boards = [folder / f"board-{rank}" for rank in range(WORLD)]
        self.pids = [folder / f"pid-{rank}" for rank in range(WORLD)]
        # Ranks are forked from a server that has imported torch. It does not import a script by itself.
        os.environ["PYTHONPATH"] = os.pathsep.join((sys.path[0], os.environ.get("PYTHONPATH", "")))
        self.processes = get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOADED)
        self.moments: Counter[tuple[str, str]] = Counter()
        self.saves = 0

    def life(self, kill: Kill) -> None:
        """Start the ranks, kill, and check. Raises Violation."""
        expected = newest(self.root)
        before = 0 if expected is None else step_of(expected)
        for board in self.boards:
            board.write_bytes(b"")
            os.truncate(board, Board.SIZE)
            Board(board).write("starting", -1, 0, 0)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [
            self.processes.Process(
                target=live, args=(rank, store.port, self.root, self.boards[rank], kill, self.pids)
            )
            for rank in range(WORLD)
        ]
        for process in ranks:
            process.start()
        boards = [Board(board) for board in self.boards]
        try:
            self._until_killed(kill, ranks, boards)
            for rank, process in enumerate(ranks):
                process.join(PATIENCE)
                if process.exitcode is None:
                    raise Violation(f"rank {rank} still runs {PATIENCE:.0f} s after the other was killed")
        finally:
            for process in ranks:
                process.kill()
                process.join()
        phase = boards[kill.victims[0]].read()[0]
        self.moments[phase, "one" if len(kill.victims) == 1 else "both"] += 1
        resumed = {board.read()[1] for board in boards}
        if resumed != {before}:
            raise Violation(f"resumed from step {resumed}, where {before} was the newest")
        self._check(max(board.read()[2] for board in boards), before)

    def _until_killed(self, kill: Kill, ranks: Sequence[Any], boards: Sequence[Board]) -> None:
        end = time.monotonic() + PATIENCE
        while any(board.read()[1] < 0 for board in boards):
            if time.monotonic() > end or any(process.exitcode is not None for process in ranks):
                raise Violation("the ranks do not start")
            time.sleep(0.005)
        if kill.change is None:
            time.sleep(kill.delay)
            for victim in kill.victims:
                ranks[victim].kill()
        for victim in kill.victims:
            ranks[victim].join(PATIENCE)
            if ranks[victim].exitcode != -signal.SIGKILL:
                raise Violation(f"rank {victim} ended with {ranks[victim].exitcode}, not by its kill")

    def _check(self, committed: int, before: int) -> None:
        """What is on the disk after a kill."""
        found = newest(self.root)
        step = 0 if found is None else step_of(found)
        self.saves += step - before
        if step < max(committed, before):
            raise Violation(f"step {max(committed, before)} was committed, and {step} is the newest")
        named = [step_folder(self.root, number) for number in range(NAMED, step + 1, NAMED)]
        latest = self.root / LATEST
        if latest.exists():
            named.append(self.root / latest.read_text().strip())
        elif step > 1:
            raise Violation(f"{latest} is missing")
        try:
            for folder in {*named, *([] if found is None else [found])}:
                if open_checkpoint(folder).progress.step != step_of(folder):
                    raise Violation(f"{folder} holds another step")
        except UserError as error:
            raise Violation(str(error)) from error
        if len(step_folders(self.root)) > step // NAMED + 3:
            raise Violation(f"{self.root} is not pruned")


def arguments() -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="default 200")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser.parse_args()


def main() -> int:
    """Returns 0, or 1 where something was lost."""
    args, started = arguments(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        kills = Kills(Path(folder), random.Random(args.seed))
        for number in range(args.kills):
            kill = Kill.drawn(kills.chance)
            try:
                kills.life(kill)
            except Violation as error:
                print(f"kills: number {number}, {kill}: {error}", file=sys.stderr)
                return 1
    phases = sorted({phase for phase, _ in kills.moments})
    figures = {
        "kills": args.kills,
        "seed": args.seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "checkpoints committed": kills.saves,
        "moments": {
            phase: {whom: kills.moments[phase, whom] for whom in ("both", "one")} for phase in phases
        },
    }
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
