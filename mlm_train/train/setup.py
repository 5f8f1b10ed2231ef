"""Build a run from its config, and close it at the end."""

import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlm_train.checkpoint.fetch import fetch_newer
from mlm_train.checkpoint.folders import remove_partials
from mlm_train.checkpoint.hf.files import carry_over
from mlm_train.checkpoint.hf.index import export_index
from mlm_train.checkpoint.load import (
    check_fits,
    check_steps,
    index_of,
    load_engine_weights,
    load_training_state,
)
from mlm_train.checkpoint.manifest import Manifest
from mlm_train.checkpoint.saver import Saver
from mlm_train.config import Config, changed_fields, dump_config
from mlm_train.data.blend import Blend
from mlm_train.data.order import ORDER
from mlm_train.data.samples import Consumed, Samples
from mlm_train.model.initial import fill_initial
from mlm_train.monitor.build import build_callbacks
from mlm_train.monitor.callback import Callbacks, Context
from mlm_train.monitor.log import Log
from mlm_train.monitor.report import Progress
from mlm_train.monitor.writers import Writers
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_engine, build_executor, build_model
from mlm_train.parallel.engine import Engine
from mlm_train.parallel.health.watchdog import watched
from mlm_train.train.memory_mode import decide_mode
from mlm_train.train.preflight import (
    LOG,
    AllDamaged,
    Resumed,
    check_output,
    find_checkpoint,
    set_all_aside,
    warm_start_source,
)
from mlm_train.train.resume import intact_checkpoint, verified_checkpoint, verify_export
from mlm_train.train.schedule import resumed_progress
from mlm_train.train.signals import Signals
from mlm_train.train.start_times import StartTimes
from mlm_train.train.step import Trainer
from mlm_train.utils.checks import Check
from mlm_train.utils.files import write_text, writing
from mlm_train.utils.run_lock import owned


@dataclass
class Run:
    """Everything a training loop needs."""

    config: Config
    runtime: processes.Runtime
    data: Blend
    samples: Samples
    validation: Samples
    further_validation: dict[str, Samples]
    trainer: Trainer
    progress: Progress
    log: Log
    writers: Writers
    callbacks: Callbacks
    saver: Saver
    start_seconds: list[dict[str, float]]  # of each rank, by part, until all had their weights

    def consumed(self, progress: Progress) -> dict[str, Consumed]:
        """What the run has consumed of each data source, by name."""
        return dict(zip(self.data.names, self.samples.consumed(progress.samples), strict=True))


@contextmanager
def opened_run(config: Config, data: Blend, times: StartTimes | None = None) -> Iterator[Run | None]:
    """A run on all ranks, its output folder locked by rank 0 until the end; None if it is already done.

    Every rank handles signals from before the folder is locked until the last checkpoint is written. Process
    groups are destroyed only after a clean end: a rank that fails must not wait for the others. times: of the
    start so far, for the log.
    """
    times = times or StartTimes()
    runtime, signals = processes.start(config), Signals()
    times.done("process groups")
    with watched(config, runtime.topology, runtime.marker), signals.listening(), ExitStack() as stack:

        def claim() -> None:
            with writing(output):
                stack.enter_context(owned(output, "being trained"))
                check_output(config)  # another command may have written there since the preflight
                if config.data.verify == "full":
                    data.verify()

        output = Path(config.train.output)
        runtime.broadcast(claim)
        fetched, resumed = _checkpoint(config, data, runtime)
        lines = fetched + runtime.broadcast(lambda: _prepare_output(config, data, resumed))
        times.done("checkpoint")
        if resumed is not None and resumed.completes(config):
            if runtime.is_rank_0:
                _say_done(config, resumed, lines)
            yield None
        else:
            run = _build(config, runtime, signals, data, resumed, times)
            for end in (run.log.close, run.writers.close, run.callbacks.on_train_end, run.saver.leave):
                stack.callback(end)  # they run last to first
            run.callbacks.on_train_start(run.progress)
            for line in lines:
                run.log.say(line)
            _say_start(run, resumed)
            times.done("callbacks")
            run.log.say(times.line(run.start_seconds))
            yield run
    processes.stop()


def _checkpoint(config: Config, data: Blend, runtime: processes.Runtime) -> tuple[list[str], Resumed | None]:
    """The checkpoint to resume from, fetched where checkpoint.url has a newer one; log lines."""

    def fits(where: str, manifest: Manifest) -> None:
        check_fits(where, manifest, config, data.fingerprint)
        check_steps(where, manifest, config)
        (Path(config.train.output) / LOG).touch()  # marks the folder as a run's, if this ends half way

    lost: list[tuple[Path, str]] = []  # on rank 0

    def find(check: Check, faults: Mapping[Path, str]) -> Resumed | None:
        try:
            return find_checkpoint(config, data, check, faults)
        except AllDamaged as error:
            lost[:] = error.damaged
            return None

    url, newest = config.checkpoint.url, partial(find_checkpoint, config, data)
    if url is None:
        return [], intact_checkpoint(config, runtime, newest)
    lines = fetch_newer(config, runtime, fits)
    resumed = intact_checkpoint(config, runtime, find)
    damaged = lost if resumed is None else resumed.damaged
    aside = runtime.broadcast(lambda: set_all_aside(damaged, f"looking for one at {url}"))
    if aside:  # the store may have it intact
        lines += [*aside, *fetch_newer(config, runtime, fits)]
    if aside or resumed is None:  # raises where none is intact
        resumed = intact_checkpoint(config, runtime, newest)
    return lines, resumed


def _prepare_output(config: Config, data: Blend, resumed: Resumed | None) -> list[str]:
    """Make the run's folder ready for training; nothing changes where it is done. Returns log lines."""
    output = Path(config.train.output)
    with writing(output):
        lines = [] if resumed is None else resumed.set_damaged_aside()
        if resumed is None or not resumed.completes(config):
            _describe_run(output, config, data)
        if resumed is None and config.checkpoint.warm_start is not None:
            lines += _copy_hf_files(warm_start_source(config), output, data)
    return lines


def _describe_run(output: Path, config: Config, data: Blend) -> None:
    """Write log, resolved config and tokenizer; remove partial checkpoints of a killed run."""
    (output / LOG).touch()
    write_text(output / "config.yaml", dump_config(config))
    shutil.copyfile(data.tokenizer, output / data.tokenizer.name)
    remove_partials(output / "checkpoints")


def _say_done(config: Config, resumed: Resumed, lines: Sequence[str]) -> None:
    """Print that nothing is left to do; the run's folder stays unchanged."""
    steps = config.train.steps
    done = f"{config.train.output} has done train.steps={steps}: nothing to do; raise train.steps to continue"
    for line in (*lines, done):
        print(f"mlm-train: {line}", file=sys.stderr, flush=True)


def _copy_hf_files(source: Path, output: Path, data: Blend) -> list[str]:
    """Copy the files beside the weights of a warm start into the run; a log line for what is left out."""
    home = source if (source / "config.json").is_file() else source.absolute().parent.parent
    left = carry_over(home, output, data.tokenizer, data.eod_id)
    return [f"not copied from {home}, whose tokenizer is not the data's: {', '.join(left)}"] if left else []


def _build(
    config: Config,
    runtime: processes.Runtime,
    signals: Signals,
    data: Blend,
    resumed: Resumed | None,
    times: StartTimes,
) -> Run:
    """Allocate model and optimizer, and load weights or training state. Every rank calls it."""
    length, seed = config.data.sequence_length, config.train.seed
    samples = data.samples("train", length, seed)
    config, mode = decide_mode(config, runtime, samples, resumed)
    model = build_model(config, runtime, data.eod_id)
    executor = build_executor(model, config, runtime)
    engine = build_engine(model, executor, config, runtime)
    progress = Progress()
    times.done("model")
    if resumed is None:
        _init_weights(engine, config, runtime)
        engine.refresh_model()
    else:
        load_training_state(resumed.folder, resumed.manifest, engine, runtime)
        progress, _ = resumed_progress(resumed.progress, resumed.config, config)
    times.done("weights")
    log, writers = Log(Path(config.train.output) if runtime.is_rank_0 else None), Writers()
    runtime.broadcast(lambda: writers.open(config, progress.step + 1))
    ranks = runtime.gather(lambda: (socket.gethostname(), times.seconds))
    context = Context(config, runtime, [host for host, _ in ranks], log, writers)
    callbacks = build_callbacks(context)
    trained_on = {"fingerprint": data.fingerprint, "eod_id": data.eod_id, "bos_id": data.bos_id}
    run = Run(
        config=config,
        runtime=runtime,
        data=data,
        samples=samples,
        validation=data.samples("validation", length, None),
        further_validation=data.validation_samples(length),
        trainer=Trainer(engine, executor, runtime, signals),
        progress=progress,
        log=log,
        writers=writers,
        callbacks=callbacks,
        start_seconds=[seconds for _, seconds in ranks],
        saver=Saver(engine, runtime, config, trained_on | {"order": ORDER}, callbacks.after_save, log.say),
    )
    if mode:
        run.log.say(mode)
    return run


def _init_weights(engine: Engine, config: Config, runtime: processes.Runtime) -> None:
    """Initialise the weights, or load those of checkpoint.warm_start."""
    if config.checkpoint.warm_start is None:
        engine.fill(lambda held: fill_initial(held, config.model, config.train.seed))
        return
    folder = runtime.broadcast(lambda: warm_start_source(config))
    if not (folder / "config.json").is_file():
        manifest = verified_checkpoint(folder, config, runtime)
        load_engine_weights(lambda: index_of(folder, manifest), engine, runtime)
        return
    verify_export(folder, config, runtime)
    load_engine_weights(lambda: export_index(folder, config.model), engine, runtime)


def _say_start(run: Run, resumed: Resumed | None) -> None:
    topology, device = run.runtime.topology, run.runtime.device.type
    start = "started a new run"
    if resumed is not None:
        start = f"resumed from {resumed.folder} at step {run.progress.step}"
        for field, (old, new) in changed_fields(resumed.config, run.config).items():
            run.log.say(f"changed since that checkpoint: {field} {old} -> {new}")
        _, line = resumed_progress(resumed.progress, resumed.config, run.config)
        if line is not None:
            run.log.say(line)
    run.log.say(f"{start} | {topology.world} processes on {device}")
