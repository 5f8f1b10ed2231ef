"""The log of a run: lines for people, on the terminal and in train.log."""

import contextlib
import time
from pathlib import Path

from rich.console import Console

from mlm_train.errors import escaped
from mlm_train.monitor.appended import Appended


class Log:
    """Of ranks that do not lead (`output` is None), every method is silent."""

    def __init__(self, output: Path | None) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.file = None if output is None else Appended(output / "train.log")

    def say(self, line: str) -> None:
        """One line on the terminal and in train.log."""
        if self.file is None:
            return
        line = escaped(line)
        with contextlib.suppress(OSError):  # a job's output is a file too
            self.console.print(line, markup=False)
        self.file.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())

    def close(self) -> None:
        """Write what waits, and say nothing more."""
        if self.file is not None:
            self.file.close()
            self.file = None
