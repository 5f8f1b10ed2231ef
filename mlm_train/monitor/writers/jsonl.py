"""train.output/metrics.jsonl: one JSON object per line.

    {"purge_step": 1, "time": ...}                       a launch starts, with step 1
    {"step": 1, "time": ..., "train/loss": 7.65, ...}    metrics of a step; a validation has its own line
    {"purge_step": 1, "time": ...}                       the next launch, or a rollback, continues with step 1

The file only grows. `purge_step` voids the lines above it of that step and later ones, as in TensorBoard's
files; `read_metrics` applies it. Non-finite numbers are null, since JSON lacks them.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_train.config import Config
from mlm_train.monitor.appended import Appended

NAME = "metrics.jsonl"


class JsonLinesWriter:
    """Appends to the file; the module's docstring gives its format."""

    def __init__(self, config: Config, first_step: int) -> None:
        path = Path(config.train.output) / NAME
        self.file = Appended(path)
        if _is_torn(path):  # by a kill: start a new line
            self.file.add(b"\n")
        self.purge(first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Append a line of metrics."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._add({"step": step, "time": time.time()} | finite)

    def purge(self, step: int) -> None:
        """Append a `purge_step` line."""
        self._add({"purge_step": step, "time": time.time()})

    def _add(self, line: Mapping[str, Any]) -> None:
        self.file.add(json.dumps(line, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Try once more to write waiting lines, then close."""
        self.file.close()


def read_metrics(run: Path) -> dict[str, dict[int, float | None]]:
    """Tag -> step -> value of a run's metrics.jsonl, without values voided by a resumed run or a rollback.

    Raises FileNotFoundError if the run has none. A line torn by a kill is ignored.
    """
    metrics: dict[str, dict[int, float | None]] = {}
    for text in (run / NAME).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if (first := line.get("purge_step")) is not None:
            kept = {tag: {s: v for s, v in steps.items() if s < first} for tag, steps in metrics.items()}
            metrics = {tag: steps for tag, steps in kept.items() if steps}
            continue
        step = line.pop("step")
        del line["time"]
        for tag, value in line.items():
            metrics.setdefault(tag, {})[step] = value
    return metrics


def _is_torn(path: Path) -> bool:
    """Whether the file ends in the middle of a line."""
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
