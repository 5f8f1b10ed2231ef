"""`python -m mlm_train ...` is the `mlm-train` command; torchrun starts ranks this way."""

import contextlib
import os
import sys

from mlm_train.utils import signals as stopping


def _end_rank(code: int) -> None:
    """Exit without Python's finalization.

    During finalization a gloo thread that frees its last tensor would abort the process, and output that does
    not fit on a full disk would change its exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def main() -> None:
    """Handle signals before anything large is imported, then run the command."""
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
