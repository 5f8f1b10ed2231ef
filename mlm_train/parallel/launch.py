"""Start the ranks of a run on this machine: torchrun's own agent, without its pages of output."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mlm_train.errors import HUNG

USER_ERROR = 2  # exit code of a rank that has said in one line what is wrong


def launch_ranks(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m mlm_train ARGUMENTS` on that many ranks; the exit code of the whole.

    0; 2 where a rank found bad input and said so; 75 where the watchdog ended a hang; otherwise 1, after
    a line that names the rank which failed first. The others are ended.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port of its own, on loopback
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "mlm_train", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (USER_ERROR, HUNG):
            return failure.exitcode
        print(f"mlm-train: rank {rank} failed first: {_reason(failure.exitcode)}", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"mlm-train: ended by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    return 0


def _reason(exit_code: int) -> str:
    """What a process's exit code says; negative ones are signals."""
    if exit_code >= 0:
        return f"exit code {exit_code}; its traceback is above"
    return f"killed by {signal.Signals(-exit_code).name}"
