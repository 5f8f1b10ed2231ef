"""Argument helpers shared by the commands."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlm_train.errors import UserError

MODEL_KINDS = "an export, a run's folder (its newest checkpoint), RUN/best, or one checkpoint (step-*)"

_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")

if TYPE_CHECKING:
    Actions = argparse._SubParsersAction[argparse.ArgumentParser]


def seed(text: str) -> int:
    """Parse the seed of a random generator: a whole number below 2^63, like train.seed."""
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def refuse_below_one(args: argparse.Namespace, *names: str) -> None:
    """UserError for the first of these options that was given a number below 1; before anything is loaded."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list | tuple) else (given,):
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: give at least 1")


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


def add_edit_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--edit`, of commands that compute FFN-M."""
    parser.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="FILE",
        help="scale keys of FFN-M as a file of `mlm-train analyze edit` says; may be repeated",
    )


def layers_in(option: str, text: str, layers: Sequence[int]) -> set[int]:
    """The layers that a text such as 3,5-7 names. UserError for one that is not among `layers`."""
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UserError(f"{option} {text or repr('')}: give layers such as 3,5-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{option} {text}: {part.strip()} ends before it starts; write {last}-{first}")
        # Stop at the first unknown layer, since the range may be huge.
        unknown = next((layer for layer in range(first, last + 1) if layer not in layers), None)
        if unknown is not None:
            raise UserError(f"{option} {text}: there is no layer {unknown}; the layers are {layers}")
        found |= set(range(first, last + 1))
    return found
