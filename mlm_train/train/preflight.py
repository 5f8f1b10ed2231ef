"""Everything that can be refused before a process group, a model or a folder exists."""

import os
from pathlib import Path
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
from mlm_train.parallel.runtime import check_compiler, check_device, check_torch
from mlm_train.train.schedule import go_on
from mlm_train.utils.checks import Check
from mlm_train.utils.extensions import find

LOG = "train.log"  # the first file of a run: it marks the folder as ours


class Resumed(NamedTuple):
    """The checkpoint a run goes on from."""

    folder: Path
    manifest: Manifest
    damaged: tuple[tuple[Path, str], ...] = ()  # newer ones and what is wrong with them

    @property
    def progress(self) -> Progress:
        """Where the run was."""
        return Progress.from_dict(self.manifest.progress.model_dump())

    @property
    def config(self) -> Config:
        """Of the run that wrote it."""
        return config_of(self.manifest)

    def completes(self, config: Config) -> bool:
        """Whether the run has done all its steps."""
        return self.progress.step >= config.train.steps

    def set_damaged_aside(self) -> list[str]:
        """Rename them, and say so in lines. Only for the process that holds the run's lock."""
        return [
            f"checkpoint {folder.name} is damaged ({fault}): kept as {set_aside(folder).name}; "
            f"going on from {self.folder.name}"
            for folder, fault in self.damaged
        ]


def preflight(config: Config, world: int, local_world: int | None) -> Blend:
    """Check layout, devices, data, output folder, and the checkpoint to resume or start from.

    `local_world`: ranks on this machine; None where it only submits the run. Returns the opened data.
    Raises UserError; nothing has been written or allocated then.
    """
    Topology.of(config.parallel, world).check_batch(config)
    check_parts(config)
    if local_world is not None:
        check_device(config.train.device, local_world)
        check_compiler(config.train)
        check_torch(config.parallel)
    data = Blend.open(config.data)
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {data.vocab_size} ids of "
            f"{data}: set model.vocab_size={data.vocab_size}"
        )
    for split in ("train", "validation"):
        data.samples(split, config.data.sequence_length, None)
    check_output(config)
    at_once = _at_once(config)
    if find_checkpoint(config, data, at_once) is None and config.checkpoint.warm_start is not None:
        warm_start_source(config)
    return data


def check_parts(config: Config) -> None:
    """UserError where a class of the user's own, or a package that a part needs, cannot be had."""
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
    """UserError where train.output cannot take the run; asked again by who has locked the folder."""
    output = Path(config.train.output)
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"train.output={output} is a file: name a folder")
    names = set(os.listdir(output))
    if (output / "checkpoints").is_dir():
        os.listdir(output / "checkpoints")  # fails where it may not be read: glob would take it for empty
    if names and LOG not in names:
        raise UserError(
            f"train.output={output} holds other files and is no run ({LOG} is missing): name a new folder"
        )
    if names and not config.checkpoint.resume:
        raise UserError(
            f"train.output={output} holds a run and checkpoint.resume=false: nothing is overwritten; "
            "name another folder"
        )


def _at_once(config: Config) -> Check:
    """What every rank compares: reading everything is left to one of them, later."""
    return "none" if config.checkpoint.verify == "none" else "sizes"


def find_checkpoint(config: Config, data: Blend, verify: Check | None = None) -> Resumed | None:
    """The newest whole checkpoint of the run's folder, verified as far as `verify` says and fitting.

    verify: checkpoint.verify where it is None.
    None where the run has saved none yet. Changes nothing on disk.
    """
    if not config.checkpoint.resume:
        return None
    found = newest_of(config, verify)
    if found is not None:
        check_fits(found.folder, found.manifest, config, data.fingerprint)
        check_steps(found.folder, found.manifest, config)
        if not found.completes(config):
            go_on(found.progress, found.config, config)
            run, before = Path(config.train.output), found.config.checkpoint
            refuse_deletions(run, committed(found.folder.parent), Keep.of(before), Keep.of(config.checkpoint))
    return found


def newest_of(config: Config, verify: Check | None = None) -> Resumed | None:
    """The newest checkpoint of a run, damage looked past where checkpoint.fall_back allows that.

    None where there is none yet. Raises UserError where it is damaged, or with fall_back all are.
    """
    root, verify = Path(config.train.output) / "checkpoints", verify or config.checkpoint.verify
    if config.checkpoint.fall_back:
        return _newest_whole(root, verify)
    folders = step_folders(root)  # one without a manifest is damaged too
    return Resumed(folders[-1], open_checkpoint(folders[-1], verify)) if folders else None


def _newest_whole(root: Path, verify: Check) -> Resumed | None:
    """Damage is looked past; what is merely of another model or version is not."""
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(step_folders(root)):
        try:
            return Resumed(folder, open_checkpoint(folder, verify), tuple(damaged))
        except Damaged as error:
            damaged.append((folder, error.fault))
    if damaged or any(root.glob(f"{DAMAGED}*")):
        example = f" ({damaged[0][1]})" if damaged else ""
        raise UserError(
            f"all checkpoints in {root} are damaged{example}: put a whole one there, or name another "
            "train.output to start over"
        )
    return None


def warm_start_source(config: Config) -> Path:
    """The folder of checkpoint.warm_start, a checkpoint or an export of the same model."""
    path = Path(config.checkpoint.warm_start or "")
    if (path / "config.json").is_file():
        written = read_config(path)
        check_same_model(path, written, config.model)
        with open_tensors(path) as tensors:
            tensors.check(written)
        return path
    folder = resolve(path)
    check_same_model(folder, config_of(open_checkpoint(folder, _at_once(config))).model, config.model)
    return folder
