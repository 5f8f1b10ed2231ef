"""Figures of an evaluation: by source and in all, as lines, JSON or TensorBoard scalars."""

import json
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from mlm_train.evaluate.score import Score, total
from mlm_train.utils.files import writing
from mlm_train.utils.terminal import shown

COUNTED = ("tokens", "words", "bytes", "windows")


def figures(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Of all sources together; where there are several, those of each are under `sources`."""
    found: dict[str, Any] = total(scores.values()).figures()
    if len(scores) > 1:
        found["sources"] = {name: score.figures() for name, score in scores.items()}
    return found


def print_figures(found: Mapping[str, Any], as_json: bool) -> None:
    """One JSON object, or a line per figure; then a line per source."""
    if as_json:
        print(json.dumps(finite(found)))
        return
    for name, value in found.items():
        if name != "sources":
            print(f"{name:24s} {value:,.4f}" if isinstance(value, float) else f"{name:24s} {value:,}")
    sources = found.get("sources", {})
    width = max(map(len, sources), default=0)
    for name, own in sources.items():
        print(
            f"{shown(name):{width}s}  perplexity {own['perplexity']:,.4f} by token, "
            f"{own['word_perplexity']:,.4f} by word, {own['byte_perplexity']:,.4f} by byte; "
            f"{own['tokens']:,} tokens"
        )


def write_events(found: Mapping[str, Any], folder: str | Path, step: int) -> None:
    """Scalars `evaluate/FIGURE` and `evaluate/FIGURE/SOURCE` of a model at a training step.

    Figures that several calls write to one folder, of a run's checkpoints, are one curve. UserError where the
    folder cannot be written.
    """
    values = {f"evaluate/{name}": value for name, value in found.items() if name != "sources"}
    for source, own in found.get("sources", {}).items():
        values |= {f"evaluate/{name}/{source}": value for name, value in own.items()}
    write_scalars(values, folder, step)


def write_scalars(values: Mapping[str, float], folder: str | Path, step: int) -> None:
    """Scalars by tag in a new event file. UserError where it cannot be written."""
    from mlm_train.monitor.writers.tensorboard import EventFiles

    with writing(Path(folder)), closing(EventFiles(Path(folder), first_step=None)) as files:
        files.scalars(values, step)


def finite(tree: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(tree, Mapping):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
