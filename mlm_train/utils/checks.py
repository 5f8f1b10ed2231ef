"""How much of a folder is compared with its manifest before it is used; the same levels in all commands.

full: every byte, by SHA-256. sizes: the presence and size of each file. none: nothing beyond what opening a
file needs.
"""

import argparse
from typing import Literal, get_args

Check = Literal["full", "sizes", "none"]
CHECKS: tuple[Check, ...] = get_args(Check)


def add_verify(
    parser: argparse.ArgumentParser, of: str, default: str = "full", bare: Check | None = None
) -> None:
    """Add `--verify`; args.verify is None where it is not given.

    of: description of whose files. bare: the value of the option without one; None: a value is required.
    """
    parser.add_argument(
        "--verify",
        choices=CHECKS,
        nargs=None if bare is None else "?",
        const=bare,
        help=f"how much of {of} is compared with its manifest first: all bytes, file sizes, or nothing "
        f"(default {default})",
    )
