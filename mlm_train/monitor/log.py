"""The log of a run: lines on the terminal and in train.log."""

import contextlib
import time
from pathlib import Path

from rich.console import Console

from mlm_train.errors import escaped
from mlm_train.monitor.appended import Appended


class Log:
    """Writes to the terminal and train.log on rank 0; on other ranks (`output` is None) it does nothing."""

    def __init__(self, output: Path | None) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.file = None if output is None else Appended(output / "train.log")

    def say(self, line: str) -> None:
        """Log one line."""
        if self.file is None:
            return
        line = escaped(line)
        with contextlib.suppress(OSError):  # the terminal may be a file on a full disk
            self.console.print(line, markup=False)
        self.file.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())

    def close(self) -> None:
        """Write waiting lines; later calls of `say` do nothing."""
        if self.file is not None:
            self.file.close()
            self.file = None
