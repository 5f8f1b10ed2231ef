"""Which checkpoints of a run are kept: the newest, those at certain steps, the best by validation loss.

This follows from the folders alone, so that a restarted run decides as the one before it did.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mlm_train.checkpoint.manifest import Manifest, Validation, read_manifest
from mlm_train.config import CheckpointConfig
from mlm_train.errors import UserError

NEWEST = "newest"


class Evaluation(NamedTuple):
    """A checkpoint's validation loss, and the data its samples were taken from."""

    validation: Validation
    data: str


class Manifests:
    """Manifests of checkpoints, each read once, when it is first needed."""

    def __init__(self, read: Callable[[Path], Manifest] = read_manifest) -> None:
        self._reader, self._read = read, dict[Path, Manifest | UserError]()

    def of(self, folder: Path) -> Manifest:
        """A folder's manifest. Raises what read_manifest raised for it."""
        if folder not in self._read:
            try:
                self._read[folder] = self._reader(folder)
            except UserError as error:
                self._read[folder] = error
        manifest = self._read[folder]
        if isinstance(manifest, UserError):
            raise manifest
        return manifest

    def evaluation(self, folder: Path) -> Evaluation | None:
        """Evaluation of a checkpoint; None where it was not evaluated or its manifest is damaged."""
        try:
            manifest = self.of(folder)
        except UserError:
            return None
        if manifest.validation is None:
            return None
        return Evaluation(manifest.validation, json.dumps(manifest.data.model_dump(), sort_keys=True))


@dataclass(frozen=True)
class Keep:
    """How many of the newest to keep, each multiple of `every` steps (0: none), and how many of the best."""

    newest: int
    every: int = 0
    best: int = 0

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Keep":
        """From a run's config."""
        return cls(config.keep_latest_k, config.keep_interval, config.keep_best_k)

    def reasons(self, folders: Sequence[Path], manifests: Manifests) -> dict[Path, list[str]]:
        """Why each of a run's checkpoints, oldest first, is kept; those without a reason may be deleted."""
        why: dict[Path, list[str]] = {folder: [] for folder in folders}
        for folder in folders[-self.newest :]:
            why[folder].append(NEWEST)
        for folder in folders:
            if self.every and step_of(folder) % self.every == 0:
                why[folder].append(f"every {self.every}")
        for comparable in ranked(folders, manifests) if self.best else ():
            for position, folder in enumerate(comparable[: self.best], 1):
                why[folder].append("best" if position == 1 else f"best {position}")
        return why


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    return int(folder.name.removeprefix("step-"))


def ranked(folders: Iterable[Path], manifests: Manifests) -> list[list[Path]]:
    """Evaluated checkpoints by ascending loss, in one list per set of validation samples.

    The list of the most recently evaluated checkpoint comes first.
    """
    groups: dict[object, list[tuple[float, int, Path]]] = {}
    for folder in sorted(folders, key=step_of, reverse=True):
        evaluation = manifests.evaluation(folder)
        if evaluation is not None:
            comparable = groups.setdefault((evaluation.data, evaluation.validation.samples), [])
            comparable.append((evaluation.validation.loss, -step_of(folder), folder))
    return [[folder for _, _, folder in sorted(comparable)] for comparable in groups.values()]


def best_of(folders: Iterable[Path], manifests: Manifests) -> Path | None:
    """The checkpoint with the lowest validation loss, the newest of equals; None where none has one."""
    groups = ranked(folders, manifests)
    return groups[0][0] if groups else None


def refuse_deletions(run: Path, folders: Sequence[Path], before: Keep, after: Keep) -> None:
    """Raise UserError where a run's config would delete checkpoints that its earlier config kept."""
    manifests = Manifests()
    kept = after.reasons(folders, manifests)
    lost = [
        folder
        for folder, reasons in before.reasons(folders, manifests).items()
        if set(reasons) - {NEWEST} and not kept[folder]
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
            "purpose, would be deleted: set it back, or delete them first with `mlm-train checkpoint prune "
            f"{run} --keep-latest-k {after.newest} --keep-interval {after.every} --keep-best-k {after.best}`"
        )
