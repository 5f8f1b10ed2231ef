"""Builds a run from its config, in an order that refuses bad input before anything is allocated."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_train.checkpoint.folders import newest, resolve
from mlm_train.checkpoint.load import (
    check_fits,
    check_same_model,
    config_of,
    load_training_state,
    load_weights,
    open_checkpoint,
)
from mlm_train.config import Config, dump_config
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError
from mlm_train.memory import make_source
from mlm_train.model.logical import initialise
from mlm_train.model.transformer import Transformer
from mlm_train.monitor.monitor import Monitor
from mlm_train.monitor.report import Progress
from mlm_train.parallel.engine import Engine
from mlm_train.parallel.runtime import Runtime
from mlm_train.parallel.topology import Topology
from mlm_train.train.step import Trainer

VALIDATION = "validation"


@dataclass
class Run:
    """Everything a training loop needs."""

    config: Config
    runtime: Runtime
    data: PreparedData
    samples: Samples
    validation: Samples
    trainer: Trainer
    progress: Progress
    monitor: Monitor


def preflight(config: Config, world: int) -> tuple[PreparedData, Path | None]:
    """All checks that need no process group: layout, data, output folder, checkpoint to resume.

    Returns the opened data and the checkpoint folder to resume from, if any. Raises UserError.
    """
    topology = Topology.of(config.parallel, world)
    topology.check_batch(config)
    data = PreparedData.open(config.data.path)
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {data.vocab_size} ids of "
            f"{config.data.path}: set model.vocab_size={data.vocab_size}"
        )
    for split in ("train", VALIDATION):
        Samples(data.split(split), config.data.sequence_length, None)
    output = Path(config.train.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"train.output={output} is a file: name a folder")
    checkpoint = newest(output / "checkpoints")
    if not config.checkpoint.resume:
        if output.exists() and any(output.iterdir()):
            raise UserError(
                f"train.output={output} exists and checkpoint.resume=false: nothing is overwritten; "
                "name another folder"
            )
        checkpoint = None
    if checkpoint is not None:
        check_fits(checkpoint, open_checkpoint(checkpoint, hashes=False), config, data.fingerprint)
    elif config.checkpoint.warm_start is not None:
        warm_start_source(config)
    return data, checkpoint


def warm_start_source(config: Config) -> Path:
    """The folder of checkpoint.warm_start, a checkpoint or an export of the same model."""
    path = Path(config.checkpoint.warm_start or "")
    if (path / "config.json").is_file():
        return path
    folder = resolve(path)
    check_same_model(folder, config_of(open_checkpoint(folder, hashes=False)), config)
    return folder


def build_run(config: Config, runtime: Runtime, data: PreparedData, checkpoint: Path | None) -> Run:
    """Allocate model and optimizer, load what is to be loaded. Every rank calls it."""
    length, seed = config.data.sequence_length, config.train.seed
    manifest: dict[str, Any] | None = None
    if checkpoint is not None:
        manifest = runtime.everywhere(lambda: open_checkpoint(checkpoint))
    model = Transformer(config.model)
    if manifest is None:
        _first_weights(model, config)
    model.to(runtime.device)
    engine = Engine(model, config.optimizer, runtime)
    progress = Progress()
    if checkpoint is not None and manifest is not None:
        load_training_state(checkpoint, manifest, engine)
        progress = Progress.from_dict(manifest["progress"])
    if runtime.leads:
        _prepare_output(config, data)
    source = make_source(config.memory.mode, model.memory_blocks()) if config.memory else None
    return Run(
        config=config,
        runtime=runtime,
        data=data,
        samples=Samples(data.split("train"), length, seed),
        validation=Samples(data.split(VALIDATION), length, None),
        trainer=Trainer(engine, source, runtime, config.train.precision, config.train.z_loss),
        progress=progress,
        monitor=Monitor.build(config, runtime, progress, checkpoint),
    )


def _first_weights(model: Transformer, config: Config) -> None:
    """Fresh weights, or those of checkpoint.warm_start."""
    if config.checkpoint.warm_start is None:
        initialise(model, config.model, config.train.seed)
        return
    folder = warm_start_source(config)
    if (folder / "config.json").is_file():
        from mlm_train.checkpoint.hf_folder import fill_model

        fill_model(folder, model)
    else:
        open_checkpoint(folder)
        load_weights(folder, model)


def _prepare_output(config: Config, data: PreparedData) -> None:
    """The run's folder explains itself: resolved config and tokenizer."""
    output = Path(config.train.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    tokenizer = data.tokenizer_file
    shutil.copyfile(tokenizer, output / tokenizer.name)
