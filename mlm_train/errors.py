"""The exceptions a user is meant to read."""

import re

HUNG = 75  # exit code of ranks that the watchdog ends (EX_TEMPFAIL of sysexits.h: starting again may help)
START_AGAIN = 85  # exit code of ranks that saved a checkpoint and ended, because SIGUSR1 asked for it
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class UserError(Exception):
    """Bad input or a broken file: one line that names the thing and the fix; exit code 2."""


class SharedUserError(UserError):
    """A UserError that every rank of a run raises alike once they have met; one rank a machine prints it."""


class PeerFailure(Exception):
    """This rank stops because of another, whose failure is shown: one line; exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does; exit code 143."""


def escaped(text: str) -> str:
    """Text that stays one line and moves no cursor: what cannot be printed as Python spells it, such as \\n.

    A message repeats names and values that others chose.
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def first_line(error: object) -> str:
    """What an error of Ray says, without its colours and what it says on further lines."""
    line = _COLOURS.sub("", str(error)).strip().partition("\n")[0]
    return line.removesuffix("To fix this, either:").rstrip(" .:;")
