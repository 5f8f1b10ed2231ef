"""The priority of threads that work beside training."""

import os
import sys
import threading

NICE = 19  # the most: on a busy core a hundredth of the time of training's thread


def yield_to_training() -> None:
    """Lower this thread's priority, and that of the threads it starts; on Linux, where threads have one each.

    Without cores to spare, each step on a CPU would wait for its own threads
    (docs/run.md). A process that runs at a lower priority itself keeps it.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(os.getpriority(os.PRIO_PROCESS, thread), NICE))
