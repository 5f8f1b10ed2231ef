"""What the ranks of test_saves.py run: saves in the background, and a resume from a slow disk."""

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mlm_train.checkpoint import saver as saver_module
from mlm_train.checkpoint.load import load_training_state, open_checkpoint
from mlm_train.checkpoint.save import Snapshot, take_snapshot, write_checkpoint
from mlm_train.checkpoint.saver import Saver
from mlm_train.data.order import ORDER
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.health.watchdog import watched
from mlm_train.parallel.runtime import Runtime
from mlm_train.train.preflight import newest_of
from mlm_train.train.resume import intact_checkpoint
from mlm_train.utils import files
from tests.checkpoint.share_cases import Layout, _config, _tensors
from tests.parallel.parity_cases import make_trainer, my_batches

DATA = {"fingerprint": "", "order": ORDER, "eod_id": 0, "bos_id": None}


def progress_at(step: int) -> dict[str, int]:
    """What a checkpoint of a step says of the run."""
    return {"step": step, "samples": 0, "tokens": 0}


def resume_slowly(folder: str, model: dict, limit: float) -> float:
    """Resume under a watchdog while the last rank's disk is slow. Returns the seconds of verification."""
    parallel = {"timeout": 2 * limit}
    config = _config(model, {}, train={"output": folder, "watchdog_timeout": limit}, parallel=parallel)
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    checkpoint = Path(folder) / "checkpoints" / "step-00000001"
    largest = max(entry.bytes for entry in open_checkpoint(checkpoint, "sizes").files)
    digest = files.hashlib.sha256

    class Slow:
        """SHA-256 whose every update takes a while."""

        def __init__(self) -> None:
            self.digest = digest()

        def update(self, block: Any) -> None:
            time.sleep(limit / 8)
            self.digest.update(block)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    with watched(config, runtime.topology, runtime.marker), ExitStack() as stack:
        runtime.marker.enter("resume")
        stack.enter_context(patch.object(processes, "ROUND", limit / 4))
        if runtime.topology.rank == runtime.topology.world - 1:
            stack.enter_context(patch.object(files.hashlib, "sha256", Slow))
            stack.enter_context(patch.object(files, "HASHED", largest // 90))
        started = time.monotonic()
        found = intact_checkpoint(config, runtime, partial(newest_of, config))
        took = time.monotonic() - started
        assert found is not None and found.folder == checkpoint
        load_training_state(found.folder, found.manifest, trainer.engine, runtime)
        return took


def save_twice(folder: str, model: dict, layouts: dict[str, Layout]) -> dict[str, list[bool]]:
    """Save in the background after each of two steps, and beside it synchronously.

    Returns for each layout, with the first write held up until the second save waits for it and without,
    whether every tensor differs between the two, and whether each is the synchronous one, bit for bit.
    """
    found: dict[str, list[bool]] = {}
    for name, layout in layouts.items():
        for held in (True, False):
            root = Path(folder) / f"{name}-{held}"
            config = _config(model, layout, train={"output": str(root)})
            runtime = processes.start(config)
            trainer = make_trainer(config, runtime)
            with _first_write_waits(runtime) if held else ExitStack():
                saver = Saver(trainer.engine, runtime, config, DATA, lambda _: None, print)
                for step in (1, 2):
                    trainer.step(my_batches(runtime, step, config), 1e-2)
                    snapshot = take_snapshot(trainer.engine, runtime, config, progress_at(step), DATA)
                    write_checkpoint(root / "alone", snapshot, runtime)
                    saver.save(progress_at(step))
                trainer.step(my_batches(runtime, 3, config), 1e-2)
                saver.finish()
            if runtime.is_rank_0:
                found[root.name] = _compared(root)
            runtime.barrier()
    return found


@contextmanager
def _first_write_waits(runtime: Runtime) -> Iterator[None]:
    """The thread begins to write step 1 when the main thread waits for it, to save step 2."""

    def late(root: Path, snapshot: Snapshot, thread_runtime: Runtime) -> Path:
        end = time.monotonic() + 60
        while snapshot.step == 1 and not runtime.marker.mark.phase.startswith("wait for the checkpoint"):
            assert threading.current_thread() is not threading.main_thread() and time.monotonic() < end
            time.sleep(0.001)
        return write_checkpoint(root, snapshot, thread_runtime)

    with patch.object(saver_module, "write_checkpoint", late):
        yield


def _compared(root: Path) -> list[bool]:
    names = [f"step-{step:08d}" for step in (1, 2)]
    first, second = (_tensors(root / "checkpoints" / name) for name in names)
    differ = all(not torch.equal(first[name], second[name]) for name in first.keys() | second.keys())
    same = (
        open_checkpoint(root / "checkpoints" / name) == open_checkpoint(root / "alone" / name)
        for name in names
    )
    return [differ, *same]


def fail_on_one_rank(folder: str, model: dict, layout: Layout) -> dict[str, Any]:
    """Save three times in the background; the second file of the last rank ends in its middle."""
    config = _config(model, layout, train={"output": folder})
    runtime = processes.start(config)
    trainer, said = make_trainer(config, runtime), list[str]()
    saver = Saver(trainer.engine, runtime, config, DATA, lambda _: None, said.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    left: list[list[str]] = []
    for step in (1, 2, 3):
        trainer.step(my_batches(runtime, step, config), 1e-2)
        if step == 2 and runtime.topology.rank == runtime.topology.world - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        saver.save(progress_at(step))
        saver.settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        left.append(sorted(path.name for path in (Path(folder) / "checkpoints").iterdir()))
    everyone = runtime.gather(lambda: said)
    assert all(lines == said for lines in everyone), everyone
    return {"said": said, "left": left}
