"""`python -m mlm_train ...` is the `mlm-train` command; torchrun launches ranks this way."""

import contextlib
import os
import sys

from mlm_train.utils import signals as stopping


def _end_rank(code: int) -> None:
    """End without Python's finalisation.

    There a thread of gloo that drops its last tensor would abort the process, and an output that a full disk
    does not take would change its exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def main() -> None:
    """Hear signals before anything large is imported, then run the command."""
    stopping.listen()
    from mlm_train import cli

    try:
        cli.main()
    except SystemExit as end:
        stopping.deafen()
        if "RANK" not in os.environ or not isinstance(end.code, int):
            raise
        _end_rank(end.code)


if __name__ == "__main__":
    main()
