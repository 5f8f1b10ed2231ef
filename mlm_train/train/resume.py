"""The checkpoint that a run resumes from: rank 0 finds it, all ranks compare its files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlm_train.checkpoint.hf import manifest as hf_manifest
from mlm_train.checkpoint.hf.folder import verify_folder
from mlm_train.checkpoint.load import open_checkpoint
from mlm_train.checkpoint.manifest import Manifest, damaged
from mlm_train.checkpoint.together import first_hash_fault
from mlm_train.config import Config
from mlm_train.errors import SharedUserError
from mlm_train.parallel.runtime import Runtime
from mlm_train.train.preflight import Resumed, quick_check
from mlm_train.utils.checks import Check
from mlm_train.utils.records import FileRecord


def intact_checkpoint(
    config: Config, runtime: Runtime, find: Callable[[Check, Mapping[Path, str]], Resumed | None]
) -> Resumed | None:
    """The newest checkpoint that is intact as far as checkpoint.verify requires; None if there is none yet.

    find: on rank 0, the newest one that is intact by a check, without those of the given folders, whose
    faults are known. Every rank calls it. Raises UserError on every rank where nothing may fall back.
    """
    faults: dict[Path, str] = {}
    while True:
        found = runtime.broadcast(lambda: find(quick_check(config), faults))
        if (
            found is None
            or (fault := _fault(found.folder, found.manifest.every_file, config, runtime)) is None
        ):
            return found
        if not config.checkpoint.fall_back:
            raise SharedUserError(str(damaged(found.folder, fault)))
        faults[found.folder] = fault


def verified_checkpoint(folder: Path, config: Config, runtime: Runtime) -> Manifest:
    """The manifest of a checkpoint to start from, verified on all ranks together. Raises UserError on all."""
    manifest = runtime.broadcast(lambda: open_checkpoint(folder, quick_check(config)))
    if fault := _fault(folder, manifest.every_file, config, runtime):
        raise SharedUserError(str(damaged(folder, fault)))
    return manifest


def verify_export(folder: Path, config: Config, runtime: Runtime) -> None:
    """Verify an export to start from, on all ranks together. Raises UserError on all."""

    def listed() -> hf_manifest.ExportManifest | None:
        verify_folder(folder, quick_check(config))
        return hf_manifest.read_manifest(folder) if config.checkpoint.verify == "full" else None

    manifest = runtime.broadcast(listed)
    if manifest is not None and (fault := first_hash_fault(folder, manifest.files, runtime)):
        raise SharedUserError(f"{fault}; {hf_manifest.FIX}")


def _fault(folder: Path, files: Sequence[FileRecord], config: Config, runtime: Runtime) -> str | None:
    """What checkpoint.verify=full finds in files that quick_check has passed."""
    return first_hash_fault(folder, files, runtime) if config.checkpoint.verify == "full" else None
