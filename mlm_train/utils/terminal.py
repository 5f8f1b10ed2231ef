"""Print text of tokens and files safely: control characters are escaped on a terminal.

Output to a pipe or a file is unchanged. cli.py escapes what the terminal's encoding lacks.
"""

import json
import re
import sys
from typing import IO, Any

# C0 except newline and tab, DEL, C1, and characters that change the text direction or separate lines.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: str, stream: IO[str] | None = None) -> str:
    """Text for a stream (default: standard output); on a terminal an ESC becomes \\x1b, as in Python."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text) if _terminal(stream) else text


def json_line(tree: Any, stream: IO[str] | None = None) -> str:
    """JSON for a stream (default: standard output); the escaping does not change its value."""
    encoding = (getattr(stream or sys.stdout, "encoding", None) or "utf-8").lower()
    text = json.dumps(tree, ensure_ascii=not encoding.startswith("utf"))
    return _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text) if _terminal(stream) else text


def _terminal(stream: IO[str] | None) -> bool:
    return (stream or sys.stdout).isatty()
