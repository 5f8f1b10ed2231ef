"""The one helper of distributed tests: run a function on several gloo processes, get what it returns.

Ranks are forked from a server that has imported torch and DeepSpeed once: that is several seconds
of a core, more than most cases compute.
"""

import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent


def forkserver(preload: str = "tests.preload") -> ForkServerContext:
    """How processes begin that need a part of it: a test process has one server, for all its tests.

    preload: the module that the server imports, if it has not started yet.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([preload])
    return processes


def run_on_ranks(
    target: str, world: int, timeout: float = 600, preload: str = "tests.preload", **arguments: Any
) -> Any:
    """`target` is "module:function"; it gets the arguments, rank 0's result comes back (through JSON).

    Any rank's failure fails the test with that rank's own traceback, and ends the others.
    """
    processes = forkserver(preload)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            processes.Process(target=_rank, args=(target, rank, world, store.port, folder, arguments))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        end, left = time.monotonic() + timeout, {process.sentinel: process for process in ranks}
        while left:
            ended = wait(left, end - time.monotonic())
            if not ended or any(left.pop(sentinel).exitcode for sentinel in ended):  # type: ignore[call-overload]
                break
        for process in ranks:
            process.kill()
            process.join()
        failures = [path.read_text() for path in sorted(folder.glob("failure-*"))]
        if failures or left:
            codes = [process.exitcode for process in ranks]
            raise AssertionError("\n".join(failures) or f"exit codes {codes} after {timeout} s at most")
        return json.loads((folder / "result").read_text())


def train_on_ranks(world: int, *words: object) -> None:
    """`mlm-train pretrain` on ranks that begin as torchrun begins them, where no launch is under test.

    What a launch spends on the imports of every rank and agent is more than these runs compute.
    """
    run_on_ranks("tests.ranks:_pretrain", world, words=[str(word) for word in words])


def _pretrain(words: list[str]) -> None:
    from mlm_train.parallel import runtime
    from tests.commands import mlm_train

    mlm_train("pretrain", *words)
    runtime.stop()


def _rank(target: str, rank: int, world: int, port: int, folder: Path, arguments: dict[str, Any]) -> None:
    """Environment of a rank on one machine, as set by torchrun, whose agent holds the store."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        module, _, name = target.partition(":")
        result = getattr(importlib.import_module(module), name)(**arguments)
        if rank == 0:
            (folder / "result").write_text(json.dumps(result))
        code = 0
    except BaseException:
        code = 1
        if not list(folder.glob("failure-*")):  # the others fail as a consequence
            (folder / f"failure-{rank}").write_text(f"rank {rank} failed\n{traceback.format_exc()}")
    # Skip Python's finalization: a gloo thread that frees its last tensor would abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
