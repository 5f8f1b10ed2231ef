"""Exceptions whose message is shown to the user."""

import re

HUNG = 75  # exit code of ranks that the watchdog ends (EX_TEMPFAIL of sysexits.h: a restart may help)
START_AGAIN = 85  # exit code of ranks that saved a checkpoint and ended on SIGUSR1
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class UserError(Exception):
    """Bad input or a broken file: one line that names the thing and the fix; exit code 2."""


class SharedUserError(UserError):
    """A UserError that every rank of a run raises; one rank per machine prints it."""


class PeerFailure(Exception):
    """This rank stops because another rank failed, which reports it: one line; exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does; exit code 143."""


def escaped(text: str) -> str:
    """Text with unprintable characters escaped as Python spells them, such as \\n, so that it stays one line.

    Messages repeat names and values from untrusted input.
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def first_line(error: object) -> str:
    """The first line of a Ray error's message, without colours."""
    line = _COLOURS.sub("", str(error)).strip().partition("\n")[0]
    return line.removesuffix("To fix this, either:").rstrip(" .:;")
