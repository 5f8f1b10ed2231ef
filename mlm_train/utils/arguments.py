"""Argument helpers shared by the commands."""

import argparse
from typing import TYPE_CHECKING

MODEL_KINDS = "an export, a run's folder (its newest checkpoint), RUN/best, or one checkpoint (step-*)"

if TYPE_CHECKING:
    Actions = argparse._SubParsersAction[argparse.ArgumentParser]


def seed(text: str) -> int:
    """Parse the seed of a random generator: a whole number below 2^63, like train.seed."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def add_action(actions: "Actions", name: str, summary: str, text: str) -> argparse.ArgumentParser:
    """Add the parser of one action; `text` is its description with examples."""
    parser = actions.add_parser(
        name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # SUPPRESS, so that it does not override `tol --debug build`.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show a traceback for errors"
    )
    return parser
