"""Everything that can be refused before a process group, a model or a folder exists."""

from pathlib import Path
from typing import Any, NamedTuple

from mlm_train.checkpoint.folders import newest, resolve
from mlm_train.checkpoint.load import check_fits, check_same_model, check_steps, config_of, open_checkpoint
from mlm_train.config import Config
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError
from mlm_train.parallel.runtime import check_compiler, check_device
from mlm_train.parallel.topology import Topology

LOG = "train.log"  # the first file of a run: it marks the folder as ours


class Resumed(NamedTuple):
    """The checkpoint a run goes on from."""

    folder: Path
    manifest: dict[str, Any]


def preflight(config: Config, world: int, local_world: int) -> PreparedData:
    """Check layout, devices, data, output folder, and the checkpoint to resume or start from.

    Returns the opened data. Raises UserError; nothing has been written or allocated then.
    """
    Topology.of(config.parallel, world).check_batch(config)
    check_device(config.train.device, local_world)
    check_compiler(config.train)
    data = PreparedData.open(config.data.path)
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {data.vocab_size} ids of "
            f"{config.data.path}: set model.vocab_size={data.vocab_size}"
        )
    for split in ("train", "validation"):
        Samples(data.split(split), config.data.sequence_length, None)
    _check_output(config)
    if find_checkpoint(config, data, hashes=False) is None and config.checkpoint.warm_start is not None:
        warm_start_source(config)
    return data


def _check_output(config: Config) -> None:
    output = Path(config.train.output)
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"train.output={output} is a file: name a folder")
    names = {path.name for path in output.iterdir()}
    if names and LOG not in names:
        raise UserError(
            f"train.output={output} holds other files and is no run ({LOG} is missing): name a new folder"
        )
    if names and not config.checkpoint.resume:
        raise UserError(
            f"train.output={output} holds a run and checkpoint.resume=false: nothing is overwritten; "
            "name another folder"
        )


def find_checkpoint(config: Config, data: PreparedData, hashes: bool = True) -> Resumed | None:
    """The newest checkpoint of the run's folder, verified (contents too with `hashes`) and fitting."""
    if not config.checkpoint.resume:
        return None
    folder = newest(Path(config.train.output) / "checkpoints")
    if folder is None:
        return None
    manifest = open_checkpoint(folder, hashes)
    check_fits(folder, manifest, config, data.fingerprint)
    check_steps(folder, manifest, config)
    return Resumed(folder, manifest)


def warm_start_source(config: Config) -> Path:
    """The folder of checkpoint.warm_start, a checkpoint or an export of the same model."""
    path = Path(config.checkpoint.warm_start or "")
    if (path / "config.json").is_file():
        return path
    folder = resolve(path)
    check_same_model(folder, config_of(open_checkpoint(folder, hashes=False)), config)
    return folder
