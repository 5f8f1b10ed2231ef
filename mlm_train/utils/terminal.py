"""Text of tokens and of files, on its way to a terminal: characters that would command it are shown escaped.

Into a pipe or a file everything goes as it is. What a terminal's encoding lacks is escaped too (cli.py).
"""

import json
import re
import sys
from typing import IO, Any

# C0 but for newline and tab, DEL, C1, and what turns the direction of writing or ends lines unseen.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: str, stream: IO[str] | None = None) -> str:
    """Text for a stream (standard output): on a terminal an ESC is \\x1b, as Python spells it."""
    return _COMMANDS.sub(lambda found: repr(found[0])[1:-1], text) if _terminal(stream) else text


def json_line(tree: Any, stream: IO[str] | None = None) -> str:
    """JSON for a stream (standard output), the same value to every reader."""
    encoding = (getattr(stream or sys.stdout, "encoding", None) or "utf-8").lower()
    text = json.dumps(tree, ensure_ascii=not encoding.startswith("utf"))
    return _COMMANDS.sub(lambda found: json.dumps(found[0])[1:-1], text) if _terminal(stream) else text


def _terminal(stream: IO[str] | None) -> bool:
    return (stream or sys.stdout).isatty()
