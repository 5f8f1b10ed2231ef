"""Builds a run from its config, and takes it down again."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlm_train.checkpoint.folders import remove_partials
from mlm_train.checkpoint.load import config_of, load_training_state, load_weights, open_checkpoint
from mlm_train.config import Config, changed_fields, dump_config
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.files import locked, write_text, writing
from mlm_train.model.logical import initialise
from mlm_train.model.transformer import Transformer
from mlm_train.monitor.monitor import Monitor
from mlm_train.monitor.report import Progress
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_executor, build_model
from mlm_train.parallel.engine import Engine
from mlm_train.parallel.watchdog import watched
from mlm_train.train.memory_mode import decide_mode
from mlm_train.train.preflight import LOG, Resumed, find_checkpoint, warm_start_source
from mlm_train.train.step import Trainer


@dataclass
class Run:
    """Everything a training loop needs."""

    config: Config
    runtime: processes.Runtime
    data: PreparedData
    samples: Samples
    validation: Samples
    trainer: Trainer
    progress: Progress
    monitor: Monitor


@contextmanager
def opened_run(config: Config, data: PreparedData) -> Iterator[Run]:
    """A run on all ranks, its output folder locked by the leading one until the end.

    The process groups are left only after a clean end: a rank that fails must not wait for the others.
    """
    runtime = processes.start(config)
    with watched(config, runtime), ExitStack() as stack:

        def claim() -> Resumed | None:
            output = Path(config.train.output)
            with writing(output):
                stack.enter_context(locked(output, "being trained"))
                found = find_checkpoint(config, data)
                _describe_run(output, config, data)
            return found

        resumed = runtime.everywhere(claim)
        run = _build(config, runtime, data, resumed)
        stack.callback(run.monitor.close)
        _say_start(run, resumed)
        yield run
    processes.stop()


def _describe_run(output: Path, config: Config, data: PreparedData) -> None:
    """The run's folder explains itself: log, resolved config, tokenizer; leftovers of a kill go."""
    (output / LOG).touch()
    write_text(output / "config.yaml", dump_config(config))
    tokenizer = data.manifest.tokenizer.file
    shutil.copyfile(data.path / tokenizer, output / tokenizer)
    remove_partials(output / "checkpoints")


def _build(config: Config, runtime: processes.Runtime, data: PreparedData, resumed: Resumed | None) -> Run:
    """Allocate model and optimizer, load what is to be loaded. Every rank calls it."""
    length, seed = config.data.sequence_length, config.train.seed
    samples = Samples(data.split("train"), length, seed)
    config, mode = decide_mode(config, runtime, samples, resumed)
    model = build_model(config, runtime)
    if resumed is None:
        _first_weights(model, config)
    engine = Engine(model, config, runtime)
    progress = Progress()
    if resumed is not None:
        load_training_state(resumed.folder, resumed.manifest, engine)
        progress = Progress.from_dict(resumed.manifest["progress"])
    run = Run(
        config=config,
        runtime=runtime,
        data=data,
        samples=samples,
        validation=Samples(data.split("validation"), length, None),
        trainer=Trainer(engine, build_executor(model, config, runtime, engine.entry), runtime),
        progress=progress,
        monitor=Monitor(config, runtime, progress),
    )
    if mode:
        run.monitor.say(mode)
    return run


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


def _say_start(run: Run, resumed: Resumed | None) -> None:
    topology, device = run.runtime.topology, run.runtime.device.type
    start = "started a new run"
    if resumed is not None:
        start = f"resumed from {resumed.folder} at step {run.progress.step}"
        for field, (old, new) in changed_fields(config_of(resumed.manifest), run.config).items():
            run.monitor.say(f"changed since that checkpoint: {field} {old} -> {new}")
    run.monitor.say(f"{start} | {topology.world} processes on {device}")
