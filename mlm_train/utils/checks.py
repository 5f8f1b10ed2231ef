"""How much of what lies on disk is compared with its manifest before it is used: one vocabulary everywhere.

full: every byte, by SHA-256. sizes: that each file is there and as long as it was. none: nothing beyond what
opening a file needs.
"""

import argparse
from typing import Literal, get_args

Check = Literal["full", "sizes", "none"]
CHECKS: tuple[Check, ...] = get_args(Check)


def add_verify(
    parser: argparse.ArgumentParser, of: str, default: str = "full", bare: Check | None = None
) -> None:
    """`--verify`; `of`: whose files, in words. args.verify is None where it is not given.

    bare: what the option alone, without a value, means; where that is None it needs one.
    """
    parser.add_argument(
        "--verify",
        choices=CHECKS,
        nargs=None if bare is None else "?",
        const=bare,
        help=f"what of {of} is compared with its manifest first: all bytes, sizes of files, or nothing "
        f"(default {default})",
    )
