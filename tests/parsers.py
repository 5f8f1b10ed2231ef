"""The parsers of all commands and their actions, as `mlm-train` builds them."""

import argparse
from functools import cache

from mlm_train.cli import COMMANDS, build_parser


@cache
def parsers() -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """("tol", "build") -> its parser, and the same for every command, with or without actions."""
    found: dict[tuple[str, ...], argparse.ArgumentParser] = {}
    for command in COMMANDS:
        _walk((command,), _actions(build_parser(command))[command], found)
    return found


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options that a parser knows, such as --output."""
    return {option for action in parser._actions for option in action.option_strings}


def _walk(
    path: tuple[str, ...],
    parser: argparse.ArgumentParser,
    found: dict[tuple[str, ...], argparse.ArgumentParser],
) -> None:
    found[path] = parser
    for name, action in _actions(parser).items():
        _walk((*path, name), action, found)


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of the actions that a parser has; empty for none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}
