"""Checks before a process group, a model or a folder is created."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mlm_train.checkpoint.folders import DAMAGED, committed, resolve, set_aside, step_folders
from mlm_train.checkpoint.hf.folder import open_tensors, read_config
from mlm_train.checkpoint.keep import Keep, refuse_deletions
from mlm_train.checkpoint.load import check_fits, check_same_model, check_steps, config_of, open_checkpoint
from mlm_train.checkpoint.manifest import Damaged, Manifest
from mlm_train.config import Config
from mlm_train.data.blend import Blend
from mlm_train.errors import UserError
from mlm_train.memory import MODES
from mlm_train.monitor.callback import Callback
from mlm_train.monitor.report import Progress
from mlm_train.monitor.writers import WRITERS
from mlm_train.monitor.writers.wandb import check_wandb
from mlm_train.parallel.engine import ENGINES
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.x0 import TRANSPORTS
from mlm_train.parallel.runtime import check_compiler, check_device, check_torch, global_rank
from mlm_train.plan.fit import check_memory, rank_bytes
from mlm_train.train.schedule import resumed_progress
from mlm_train.utils.checks import Check
from mlm_train.utils.extensions import find
from mlm_train.utils.url_folder import check_url

NO_FAULTS: Mapping[Path, str] = MappingProxyType({})
LOG = "train.log"  # the first file of a run: marks a folder as a run


class Resumed(NamedTuple):
    """The checkpoint from which a run resumes."""

    folder: Path
    manifest: Manifest
    damaged: tuple[tuple[Path, str], ...] = ()  # newer checkpoints, and why each is damaged

    @property
    def progress(self) -> Progress:
        """Progress of the run at the checkpoint."""
        return Progress.from_dict(self.manifest.progress.model_dump())

    @property
    def config(self) -> Config:
        """Config of the run that wrote the checkpoint."""
        return config_of(self.manifest)

    def completes(self, config: Config) -> bool:
        """Whether the run has already done train.steps."""
        return self.progress.step >= config.train.steps

    def set_damaged_aside(self) -> list[str]:
        """Rename damaged checkpoints; a log line for each. Only for the process that holds the run's lock."""
        return set_all_aside(self.damaged, f"resuming from {self.folder.name}")


def set_all_aside(damaged: Sequence[tuple[Path, str]], then: str) -> list[str]:
    """Rename damaged checkpoints; a log line for each. then: what follows. See Resumed.set_damaged_aside."""
    return [
        f"checkpoint {folder.name} is damaged ({fault}): kept as {set_aside(folder).name}; {then}"
        for folder, fault in damaged
    ]


class AllDamaged(UserError):
    """A run's folder has checkpoints, but no intact one. damaged: each, and why."""

    def __init__(self, root: Path, damaged: Sequence[tuple[Path, str]]) -> None:
        example = f" ({damaged[0][1]})" if damaged else ""
        super().__init__(
            f"all checkpoints in {root} are damaged{example}: restore an intact one, or give another "
            "train.output to start over"
        )
        self.damaged = damaged


def preflight(config: Config, world: int, local_world: int | None) -> Blend:
    """Check layout, devices, data, output folder, and the checkpoint to resume or start from.

    local_world: ranks on this machine; None if it only submits the run. Returns the opened data.
    Raises UserError before anything is written or allocated.
    """
    topology = Topology.of(config.parallel, world)
    topology.check_batch(config)
    check_parts(config)
    if config.checkpoint.url is not None:
        check_url(config.checkpoint.url)
    if local_world is not None:
        check_device(config.train.device, local_world)
        check_compiler(config.train)
        check_torch(config.parallel)
        check_memory(config, topology, rank_bytes(config, local_world))
    data = Blend.open(config.data)
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {data.vocab_size} token ids of "
            f"{data}: set model.vocab_size={data.vocab_size}"
        )
    for split in ("train", "validation"):
        data.samples(split, config.data.sequence_length, None)
    data.validation_samples(config.data.sequence_length)
    check_output(config)
    # The others would open the same files at the same time; what rank 0 finds ends the run on all of them.
    if global_rank() == 0:
        try:
            newest = find_checkpoint(config, data, quick_check(config))
        except AllDamaged:
            if config.checkpoint.url is None:  # which may have an intact one
                raise
            newest = None
        if newest is None and config.checkpoint.warm_start is not None:
            warm_start_source(config)
    return data


def check_parts(config: Config) -> None:
    """Raise UserError if a user's class, or a package that a part needs, is missing."""
    if config.memory is not None and config.memory.mode != "auto":
        find("memory.mode", config.memory.mode, MODES)
    find("parallel.x0_transport", config.transport, TRANSPORTS)
    find("parallel.engine", config.parallel.engine, ENGINES, Engine)
    for name in config.monitor.callbacks:
        find("monitor.callbacks", name, {}, Callback)
    for name in config.monitor.writers:
        find("monitor.writers", name, WRITERS)
    if "wandb" in config.monitor.writers:
        check_wandb()


def check_output(config: Config) -> None:
    """Raise UserError if train.output cannot hold the run; repeated once the folder is locked."""
    output = Path(config.train.output)
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"train.output={output} is a file: give a folder")
    names = set(os.listdir(output))
    if (output / "checkpoints").is_dir():
        os.listdir(output / "checkpoints")  # raises if unreadable, which glob would treat as empty
    if names and LOG not in names:
        raise UserError(
            f"train.output={output} holds other files and is not a run ({LOG} is missing): give a new folder"
        )
    if names and not config.checkpoint.resume:
        raise UserError(
            f"train.output={output} holds a run and checkpoint.resume=false: nothing is overwritten; "
            "give another folder"
        )


def quick_check(config: Config) -> Check:
    """What rank 0 verifies alone; a full read is left to all ranks together (train/resume.py)."""
    return "none" if config.checkpoint.verify == "none" else "sizes"


def find_checkpoint(
    config: Config, data: Blend, verify: Check | None = None, faults: Mapping[Path, str] = NO_FAULTS
) -> Resumed | None:
    """The newest intact checkpoint of the run's folder; None if there is none yet. Read-only.

    verify: how thoroughly to verify it (default: checkpoint.verify). faults: of folders known to be damaged.
    Raises UserError if it does not fit the config or the data.
    """
    if not config.checkpoint.resume:
        return None
    newest = newest_of(config, verify, faults)
    if newest is not None:
        check_fits(newest.folder, newest.manifest, config, data.fingerprint)
        check_steps(newest.folder, newest.manifest, config)
        if not newest.completes(config):
            resumed_progress(newest.progress, newest.config, config)
            run, before = Path(config.train.output), newest.config.checkpoint
            refuse_deletions(
                run, committed(newest.folder.parent), Keep.of(before), Keep.of(config.checkpoint)
            )
    return newest


def newest_of(
    config: Config, verify: Check | None = None, faults: Mapping[Path, str] = NO_FAULTS
) -> Resumed | None:
    """The newest checkpoint of a run, or the newest intact one with checkpoint.fall_back.

    None if there is none yet. Raises UserError if it is damaged; with fall_back AllDamaged, if all are.
    """
    root, verify = Path(config.train.output) / "checkpoints", verify or config.checkpoint.verify
    if config.checkpoint.fall_back:
        return _newest_intact(root, verify, faults)
    folders = step_folders(root)  # one without a manifest is damaged too
    return Resumed(folders[-1], open_checkpoint(folders[-1], verify)) if folders else None


def _newest_intact(root: Path, verify: Check, faults: Mapping[Path, str]) -> Resumed | None:
    """The newest checkpoint that is not damaged. One of another model or version is an error as it is."""
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(step_folders(root)):
        if folder in faults:
            damaged.append((folder, faults[folder]))
            continue
        try:
            return Resumed(folder, open_checkpoint(folder, verify), tuple(damaged))
        except Damaged as error:
            damaged.append((folder, error.fault))
    if damaged or any(root.glob(f"{DAMAGED}*")):
        raise AllDamaged(root, damaged)
    return None


def warm_start_source(config: Config) -> Path:
    """The folder of checkpoint.warm_start: a checkpoint or an export of the same model.

    Raises UserError if it is missing, damaged or of another model.
    """
    path = Path(config.checkpoint.warm_start or "")
    if (path / "config.json").is_file():
        written = read_config(path)
        check_same_model(path, written, config.model)
        with open_tensors(path) as tensors:
            tensors.check(written)
        return path
    folder = resolve(path)
    check_same_model(folder, config_of(open_checkpoint(folder, quick_check(config))).model, config.model)
    return folder
