"""Which checkpoints of a run stay: the newest, those of certain steps, the best by validation loss.

It follows from the folders alone, so a run that is started again knows what the one before it knew.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlm_train.checkpoint.manifest import Validation, read_manifest
from mlm_train.config import CheckpointConfig
from mlm_train.errors import UserError

NEWEST = "newest"


@dataclass(frozen=True)
class Keep:
    """So many of the newest; those whose step is a multiple of `every` (0: none); so many of the best."""

    newest: int
    every: int = 0
    best: int = 0

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Keep":
        """What a run's config says."""
        return cls(config.keep_latest_k, config.keep_interval, config.keep_best_k)

    def reasons(self, folders: Sequence[Path]) -> dict[Path, list[str]]:
        """Why each of a run's checkpoints, given from the oldest on, stays; those without a reason go."""
        why: dict[Path, list[str]] = {folder: [] for folder in folders}
        for folder in folders[-self.newest :]:
            why[folder].append(NEWEST)
        for folder in folders:
            if self.every and step_of(folder) % self.every == 0:
                why[folder].append(f"every {self.every}")
        for alike in ranked(folders) if self.best else ():
            for place, folder in enumerate(alike[: self.best], 1):
                why[folder].append("best" if place == 1 else f"best {place}")
        return why


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def validation_of(folder: Path) -> Validation | None:
    """What a checkpoint says of its weights; None where they were not evaluated, or it is damaged."""
    measured = _measured(folder)
    return None if measured is None else measured.validation


def ranked(folders: Iterable[Path]) -> list[list[Path]]:
    """Checkpoints that were evaluated, the lowest loss first; apart where it was on other samples.

    Those that were evaluated as the newest of them come first.
    """
    groups: dict[object, list[tuple[float, int, Path]]] = {}
    for folder in sorted(folders, key=step_of, reverse=True):
        measured = _measured(folder)
        if measured is not None:
            alike = groups.setdefault((measured.data, measured.validation.samples), [])
            alike.append((measured.validation.loss, -step_of(folder), folder))
    return [[folder for _, _, folder in sorted(alike)] for alike in groups.values()]


def best_of(folders: Iterable[Path]) -> Path | None:
    """The one of the lowest validation loss; of equals the newest."""
    found = ranked(folders)
    return found[0][0] if found else None


def refuse_deletions(run: Path, folders: Sequence[Path], before: Keep, after: Keep) -> None:
    """UserError where a run's config keeps less on purpose than the one that wrote its checkpoints."""
    stays = after.reasons(folders)
    lost = [
        folder
        for folder, reasons in before.reasons(folders).items()
        if set(reasons) - {NEWEST} and not stays[folder]
    ]
    if lost:
        changed = [
            f"checkpoint.keep_{name} {old} -> {new}"
            for name, old, new in (
                ("interval", before.every, after.every),
                ("best_k", before.best, after.best),
            )
            if old != new
        ]
        raise UserError(
            f"{', '.join(changed)}: {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''}, kept on "
            "purpose, would be deleted: set it back, or delete them first by `mlm-train checkpoint prune "
            f"{run} --keep-latest-k {after.newest} --keep-interval {after.every} --keep-best-k {after.best}`"
        )


class _Measured(NamedTuple):
    """`data`: what the samples were taken from."""

    validation: Validation
    data: str


def _measured(folder: Path) -> _Measured | None:
    try:
        manifest = read_manifest(folder)
    except UserError:
        return None
    if manifest.validation is None:
        return None
    return _Measured(manifest.validation, json.dumps(manifest.data.model_dump(), sort_keys=True))
