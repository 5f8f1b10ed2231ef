"""`mlm-train` with one rank that misbehaves: `python -m tests.train.misbehave WHAT RANK pretrain ...`.

WHAT is sleep-in-data, sleep-in-forward or raise-in-forward (at FATAL_CALL), slow-data (at every call).
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from mlm_train.cli import main
from mlm_train.model.transformer import Transformer
from mlm_train.train import loop

FATAL_CALL = {"data": 3, "forward": 19}  # counted from 1; with 8 micro-batches per step: step 3, number 2
SLOW_SECONDS = 1.5


def sleep_for_ever() -> None:
    """Sleep until the process is killed."""
    while True:
        time.sleep(3600)


def fail() -> None:
    """Raise, like a bug in a model."""
    raise ValueError("the third stair is missing")


def disturbed(
    function: Callable[..., Any], fatal: int, disturbance: Callable[[], None]
) -> Callable[..., Any]:
    """`function` with a disturbance before call number `fatal`; 0: before every call."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if fatal in (calls, 0):
            disturbance()
        return function(*args, **kwargs)

    return wrapper


if __name__ == "__main__":
    what, rank = sys.argv[1:3]
    if os.environ["RANK"] == rank:
        data, forward = FATAL_CALL.values()
        if what == "sleep-in-data":
            loop.step_batches = disturbed(loop.step_batches, data, sleep_for_ever)
        elif what == "slow-data":
            loop.step_batches = disturbed(loop.step_batches, 0, lambda: time.sleep(SLOW_SECONDS))
        else:
            disturbance = sleep_for_ever if what == "sleep-in-forward" else fail
            Transformer.run_layers = disturbed(Transformer.run_layers, forward, disturbance)  # type: ignore[method-assign]
    main(sys.argv[3:])
